"""EnCodec of transformers through the packed layers."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import assert_as_accurate
from torch import nn

from aar_kernels.nn import PackedSEANet
from aar_kernels.seanet.encodec import encodec_layers

transformers = pytest.importorskip("transformers")


def make_model(**options):
    torch.manual_seed(0)
    sizes = {"num_filters": 4, "hidden_size": 20, "upsampling_ratios": [3, 2], "num_lstm_layers": 1} | options
    return transformers.EncodecModel(transformers.EncodecConfig(**sizes)).eval()


OPTIONS = [
    {},
    {"use_causal_conv": False, "audio_channels": 2, "num_lstm_layers": 2},
    {"norm_type": "time_group_norm", "use_causal_conv": False, "audio_channels": 2},
    {"pad_mode": "constant", "use_conv_shortcut": False, "num_residual_layers": 3, "compress": 4},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("length", [1, 3, 6, 301])
@torch.no_grad()
def test_encoder_and_decoder(backend, options, length):
    model = make_model(**options)
    exact = copy.deepcopy(model).double()
    x = torch.randn(2, options.get("audio_channels", 1), length)
    for name in ("encoder", "decoder"):
        network = getattr(model, name)
        result = PackedSEANet(encodec_layers(network))(x, backend=backend)
        assert_as_accurate(result, network(x), getattr(exact, name)(x.double()), name)
        x = result


def test_what_cannot_be_expressed():
    model = make_model()
    model.decoder.layers[0].pad_mode = "replicate"
    with pytest.raises(ValueError, match="no layer of this package is a EncodecConv1d such as this"):
        encodec_layers(model.decoder)
    model.encoder.layers[0] = nn.Tanh()
    with pytest.raises(ValueError, match="no layer of this package is a Tanh"):
        encodec_layers(model.encoder)
    assert make_model(trim_right_ratio=0.5) is not None
    with pytest.raises(ValueError, match="EncodecConvTranspose1d"):
        encodec_layers(make_model(trim_right_ratio=0.5).decoder)
