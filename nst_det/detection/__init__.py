"""Stage two: a detector trained from a backbone, alone or with a frozen teacher, by one of two engines."""
