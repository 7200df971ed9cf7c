"""The records of manifest.json. docs/artifact.md describes every field of them."""
