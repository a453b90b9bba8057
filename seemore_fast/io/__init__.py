"""Image files: read and written with their metadata; atomic writing of any file."""
