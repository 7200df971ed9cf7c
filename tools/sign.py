"""`staticvl sign`."""

from __future__ import annotations

import argparse

from ..runtime.artifact import verify
from ..runtime.signature import new_key, sign


def run(args: argparse.Namespace) -> int:
    key = args.key or args.new_key
    if args.new_key is not None:
        public = new_key(args.new_key)
        print(f"{args.new_key}: the private key, which signs; keep it secret\n{public}: the public key, for those who verify")
    if args.artifact is None:
        if args.new_key is None:
            raise ValueError("no artifact was given; usage: staticvl sign ARTIFACT --key FILE")
        return 0
    artifact = verify(args.artifact)  # a signature vouches for every file
    sign(artifact.folder, artifact.manifest, key)
    print(f"{args.artifact}: signed {artifact.manifest.digest[:16]}, {len(artifact.manifest.files)} files")
    return 0
