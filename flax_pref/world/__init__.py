"""The demo world: drawn scenes with captions, a judge that knows them, and a small base model."""
