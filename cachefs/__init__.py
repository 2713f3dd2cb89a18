"""cachefs: a FUSE read-through cache file system for model files."""

__version__ = "0.1.0"
