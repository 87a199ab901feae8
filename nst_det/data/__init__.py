"""Data on disk: PASCAL VOC folders, image folders, the generated data set, and what can be wrong with them."""
