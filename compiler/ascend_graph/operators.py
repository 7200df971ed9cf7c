"""The operators that lowerings are made of: aten, torch_npu's `npu`, torchair's own `air`, torch.distributed's.

Those of `npu` and `air` exist once torchair is loaded (torchair_host.load).
"""

import torch

npu, air, aten, c10d = torch.ops.npu, torch.ops.air, torch.ops.aten, torch.ops._c10d_functional
