"""A small world that needs no downloads: drawn scenes with captions, a judge, and a base checkpoint."""
