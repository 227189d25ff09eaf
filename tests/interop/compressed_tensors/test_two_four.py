"""Two of every four weights as PyTorch takes them apart for CUTLASS: the same bits, read by it to the same numbers."""

import numpy as np
import pytest
import torch
from torch.sparse import _semi_structured_conversions as conversions

from jaxprune import export


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("shape", [(128, 32), (64, 96), (256, 128)])
def test_values_and_metadata_are_those_of_pytorch(dtype, shape):
    generator = torch.Generator().manual_seed(shape[0])
    dense = torch.randint(1, 100, shape, generator=generator).to(dtype)
    ranks = torch.rand((shape[0] // 4, 4, shape[1]), generator=generator).argsort(dim=1).argsort(dim=1)
    keep = (ranks < 2).reshape(shape) & (torch.rand(shape, generator=generator) < 0.8)  # groups of one and of none, too
    dense = torch.where(keep, dense, 0)
    # NumPy knows no bfloat16 of torch's; whole numbers below 256 are the same in float16.
    kernel = (dense.to(torch.float16) if dtype == torch.bfloat16 else dense).numpy()
    sparse = export.to_two_four(kernel, keep.numpy())
    values, metadata = conversions.sparse_semi_structured_from_dense_cutlass(dense.T.contiguous())
    ours = export.pack_cutlass(sparse)
    np.testing.assert_array_equal(sparse.values, values.to(torch.float16).numpy())
    np.testing.assert_array_equal(ours, metadata.numpy())
    restored = conversions.sparse_semi_structured_to_dense_cutlass(values, torch.from_numpy(ours))
    assert torch.equal(restored.T, dense)
    np.testing.assert_array_equal(export.unpack_cutlass(sparse.values, metadata.numpy()).dense(), kernel)
