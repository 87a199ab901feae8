"""Seeing selectivity: the channel maps of a teacher and of students on images, and how near they are to each other."""
