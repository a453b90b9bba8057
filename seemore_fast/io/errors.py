"""What goes wrong with one file and costs the others nothing."""


class ImageError(ValueError):
    """A file that cannot be read or written as an image, said in one line."""
