"""Results on the Hub: what a folder holds, its card, and the upload."""
