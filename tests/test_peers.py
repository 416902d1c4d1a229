"""bench/peers.py: the libraries that dashpot is compared with."""

import sys

import pytest
import torch
from dashpot._measure import Peer

from bench import peers

pytestmark = pytest.mark.peers


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("auraloss.freq", "MultiResolutionSTFTLoss"),
        ("byzfl", "Median"),
        ("focal_frequency_loss", "FocalFrequencyLoss"),
        ("geom_median.torch", "compute_geometric_median"),
        ("lightly.loss", "NTXentLoss"),
        ("open_clip.loss", "ClipLoss"),
        ("pytorch_metric_learning.losses", "SupConLoss"),
        ("torchjd.aggregation", "Krum"),
    ],
)
def test_a_peer_loads_and_leaves_no_stand_in(module, name):
    assert peers.has(module)
    found = getattr(peers.load(module), name)
    assert found.__module__.partition(".")[0] == module.partition(".")[0]
    assert not [one for one in sys.modules.values() if isinstance(one, peers._Empty)]


def test_a_library_that_remembers_what_is_installed_sees_no_stand_in():
    """open_clip imports transformers where it finds it."""
    peers.load("open_clip.loss")
    import transformers.utils

    for name in ("torchvision", "timm"):
        available = getattr(transformers.utils, f"is_{name}_available")
        assert available() == peers.has(name)


def test_a_peer_computes():
    rows = torch.tensor([[1.0, 5.0], [2.0, 4.0], [9.0, 3.0]])
    assert peers.load("byzfl").Median()(rows).tolist() == [2.0, 4.0]


def test_what_is_not_installed():
    assert not peers.has("no_such_library.module")
    here, elsewhere = Peer(min), Peer(max, needs="no_such_library")
    assert peers.installed({"here": here, "elsewhere": elsewhere}) == {"here": here}
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        peers.load("no_such_library")
