"""The layouts that are read and written, one file each."""
