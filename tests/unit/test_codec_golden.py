"""Files that were written once decode to the same bits forever."""

import hashlib

import numpy as np
import pytest
import torch

from de_ray import codec
from de_ray.codec.tensor import QuantizedTensor

# Written by `encode(sample(), {"1.count": torch.tensor(258)}, "golden")`. A change that breaks this needs a new format
# version. Version 1 is read, and no longer written.
VERSION_1 = bytes.fromhex("""
38000000000000007b22223a7b226474797065223a225538222c227368617065223a5b3332345d2c22646174615f6f666673657473223a5b302c
3332345d7d7d444552016b4b674bcfcf4949cd6365e030d02b4fcd4ccf2811d0902c67606666d8c5b083610b830983058335134b52666231a786
06c387564f1b060e43a852652e1666661d86056cac67cf9cb165622d4e4ecc4965646498baff9a31136b727e695e090b6b665e89990913230318
00000cd4d63b92ca2db69e6f8e2f02d4dff281c00a488eb369f239a0c2b6b1ef09483cdc5fcf28634e21d1086c1f6f5d0dfacc747f658f441e0a
68c813d6afbc031891a2592f08b8a1d53b0c4f87820a1f7b46feff939c68c9e79f475f26343f18781ebe347f544aad1668f2b7bc8f34ac1efdca
ead9b28ef107d332b623167734f6a8fc6f56faed8ce834353fce0527b490c9f222e1f241e47c359e254f105d1f234de3f8b79ea8a690ad27766b
8e9600b11ea9a1cf1d2781f8c8c83b506cc06cc94e205272c88683be2d289a39f7148760d57ad3de
""")
VERSION_2 = bytes.fromhex("""
38000000000000007b22223a7b226474797065223a225538222c227368617065223a5b3331365d2c22646174615f6f666673657473223a5b302c
3331365d7d7d444552026b4b674bcfcf4949cd6365e030d02b4fcd4ccf2811d0902c67606666d8c5b083610b830983058335134b52666231a786
06c387564f1b060e43a852652e1666661d86056cac67cf9cb165622d4e4ecc4965646498baff9a31136b727e695e090b6b665e89990913230318
00000cd4d63b92ca2db69e6f8e2f87e7cff24676fbe1903094e7c4c37506ff5a5baa686940408da1af4f4603d6c48d6a6d9c83c83a9efb8e81a5
753e58539a578a2b9e69689c9bf061e384ce6125bcb1972688daf1f283cfed0180a9d8d5ba1c89ae573870b51efbba53c1736f5ba10b70d8a4f3
b4117a0f9e74418676986cf7df91592fbbe6513d9ecf38aa4afe31f9ed2704a79ed9fe837665e3ace49d05af8bb590aeec74948867051e0d677d
e6fce531160c1b3babd11b78a71552e51d8634b7c964951adfab8e9f2cf434ad
""")
STATE = "bec6e71cca6d34f982456e37edc96f7bcbd406a3933ddd2aecd745db97c38848"
"""SHA-256 of the decoded tensors' bytes, in order."""


def sample() -> list[QuantizedTensor]:
    """Tensors from whole-number arithmetic alone, so that no random generator's change can touch them."""
    n = np.arange(40 * 25, dtype=np.int64)
    noise = (n * 2654435761 >> 7) % 1009
    columns = np.where((n % 25) % 3 == 0, 300, 20)
    symbols = np.where(noise < columns, 1 + noise % 3, 0) * np.where(noise % 2, 1, -1)
    return [
        QuantizedTensor("0.weight", symbols.reshape(40, 25).astype(np.int32),
                        levels=np.array([-0.75, -0.5, -0.25, 0.25, 0.5, 0.875], np.float32)),
        QuantizedTensor("0.bias", (noise[:40] - 500).astype(np.int32), step=np.float32(0.0123)),
        QuantizedTensor("1.weight", symbols[:360].reshape(10, 4, 3, 3).astype(np.int32), step=np.float32(0.1),
                        row_exponents=np.array([0, 0, -8, 3, 0, 1, 0, 0, 11, -2], np.int32)),
        QuantizedTensor("1.scale", np.array(-9_999_999, np.int32), step=np.float32(1e-7)),
    ]


@pytest.mark.parametrize("golden", [VERSION_1, VERSION_2], ids=["version 1", "version 2"])
def test_a_golden_file_decodes_to_the_same_bits(golden: bytes) -> None:
    state = codec.decode(golden)
    assert list(state) == ["0.weight", "0.bias", "1.weight", "1.scale", "1.count"]
    assert state["1.count"].equal(torch.tensor(258))
    for tensor in sample():
        assert state[tensor.name].numpy().tobytes() == tensor.dequantize().tobytes()
    digest = hashlib.sha256(b"".join(value.numpy().tobytes() for value in state.values()))
    assert digest.hexdigest() == STATE


def test_the_golden_file_is_written_again() -> None:
    again = codec.encode(sample(), {"1.count": torch.tensor(258)}, "golden")
    # Deflate's bytes may differ between versions of zlib; what follows them may not.
    assert again[-270:] == VERSION_2[-270:]


def test_a_file_of_version_1_is_summed_up_by_its_own_model() -> None:
    summary = codec.inspect(VERSION_1)
    assert abs(summary.container_bytes + sum(t.payload_bytes for t in summary.tensors) - len(VERSION_1)) < 12
