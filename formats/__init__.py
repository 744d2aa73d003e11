"""Formats of the files that users keep, the reading of image files, and the fitting of images to a size."""
