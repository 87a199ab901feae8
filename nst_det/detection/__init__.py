"""Stage two: a detector trained from a backbone, alone or beside a frozen teacher, by one of two engines."""
