"""Bucket sizes from traffic: what `staticvl tune-buckets` is made of."""
