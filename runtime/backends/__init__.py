"""What runs graphs: ONNX Runtime on CPU, Ascend cards, the simulator of GE graphs, and ranks of several processes."""

import os

# onnxruntime reads it once, on import. Without it the library leaves an identifier of the machine and a database of events
# below the home directory, and holds the address of a collector.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
