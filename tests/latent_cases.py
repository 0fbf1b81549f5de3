"""A made-up codec whose epilogue shows a token's position, LatentKVs of it, and what leaves them coded."""

import copy

import torch
from torch import nn

from lorc_fx.codec import Basis, Codec, make_codec, model_segments
from lorc_fx.decoder import POSITION, Decoder
from lorc_fx.latent import LatentKV, extend
from lorc_fx.packing import MODEL, Format, Segment, pack

HEADS, DIM, RANK = 2, 3, 4
LAYOUTS = {
    "BHTD": ("B", HEADS, "T", DIM),
    "BTHD": ("B", "T", HEADS, DIM),
    "BTn": ("B", "T", HEADS * DIM),
    "TBn": ("T", "B", HEADS * DIM),
}


class Epilogue(nn.Module):
    """Adds the token's position (so that a lost one shows) and brings y into the layout."""

    def __init__(self, layout, positions):
        super().__init__()
        self.layout, self.positions = layout, positions

    def forward(self, y, positions):
        if self.positions:
            y = y + positions.unsqueeze(-1)
        if self.layout == "TBn":
            return y.transpose(0, 1)
        y = y if self.layout == "BTn" else y.unflatten(2, (HEADS, DIM))
        return y.transpose(1, 2) if self.layout == "BHTD" else y


def codec_of(layout="BHTD", positions=True, seed=0, dtype=torch.float32):
    traced = torch.fx.symbolic_trace(Epilogue(layout, positions))
    decoder = Decoder(traced, HEADS * DIM, LAYOUTS[layout], dtype, POSITION if positions else None, "adds positions")
    g = torch.Generator().manual_seed(seed)
    encode, decode = torch.randn(RANK, 5, generator=g), torch.randn(RANK, HEADS * DIM, generator=g)
    mean = torch.randn(HEADS * DIM, generator=g).to(dtype)
    form = Format(model_segments(RANK), 1, dtype)
    return Codec(decoder, form, encode.to(dtype), None, None, None, decode.to(dtype), mean, ())


def packed_codec_of(layout="BHTD", positions=True):
    """Rows of bytes: two columns in the model's dtype, two at 4 bits, two means."""
    weight = torch.randn(HEADS * DIM, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    u = torch.linalg.svd(weight)[0]
    basis = Basis(u, u.T, torch.arange(6.0, 0, -1).double(), torch.stack([u[0], 20 * u[1]]), informed=True)
    decoder = codec_of(layout, positions).decoder
    return make_codec(weight, None, basis, (Segment(2, MODEL), Segment(2, 4)), decoder, (), torch.float32)


def codes_of(codec, tokens, batch, seed):
    """Rows as the codec writes them, of random latents."""
    latents = torch.randn(tokens, batch, codec.latent_width, generator=torch.Generator().manual_seed(seed))
    f = codec.format
    if f.plain:
        return latents.to(codec.dtype)
    return pack(latents, codec.offsets, codec.spread, f.spec, f.choices, f.dtype)


def latent_of(codec, tokens=5, batch=2, seed=1, start=0):
    codes = codes_of(codec, tokens, batch, seed)
    positions = (torch.arange(start, start + tokens, dtype=torch.int32) * 10)[:, None].repeat(1, batch)
    return LatentKV.born(codec, codes, positions if codec.decoder.needs_positions else None)


def append(latent, new):
    """What a compiled decode step does: write rows behind the view, in place where that is allowed."""
    made = extend([latent], new.length)[0]
    made.codes[latent.length :] = new.codes
    if made.positions is not None:
        made.positions[latent.length :] = new.positions
    return made


def same(latent, dense):
    assert isinstance(latent, LatentKV), f"decoded: {type(latent)}"
    assert latent.shape == dense.shape and latent.dtype == dense.dtype
    assert torch.equal(latent.dense(), dense)


def dims(latent):
    return latent.codec.decoder.token_dim, latent.codec.decoder.batch_dim


#: name -> fn(value, token dim, batch dim) that moves tokens or batch rows only, so that the result stays coded
ROW_OPS = {
    "first tokens": lambda x, t, b: x.narrow(t, 0, 3),
    "last tokens": lambda x, t, b: x[(slice(None),) * t + (slice(-2, None),)],
    "no tokens": lambda x, t, b: torch.ops.aten.slice.Tensor(x, t, 2, 2),
    "all tokens": lambda x, t, b: torch.ops.aten.slice.Tensor(x, t, 0, 1 << 62),
    "one row": lambda x, t, b: torch.ops.aten.slice.Tensor(x, b, 1, 2),
    "reorder rows": lambda x, t, b: x.index_select(b, torch.tensor([1, 0, 1])),
    "reorder tokens": lambda x, t, b: x.index_select(t, torch.tensor([4, 0, 0])),
    "index rows": lambda x, t, b: x[(slice(None),) * b + (torch.tensor([1, 1]),)],
    "mask tokens": lambda x, t, b: x[(slice(None),) * t + (torch.tensor([True, False, True, True, False]),)],
    "twice in batch": lambda x, t, b: torch.cat([x, x], b),
    "twice in tokens": lambda x, t, b: torch.cat([x, x], t),
    "negative dim": lambda x, t, b: torch.cat([x, x], t - x.dim()),
    "repeat rows": lambda x, t, b: x.repeat_interleave(3, dim=b),
    "repeat rows by counts": lambda x, t, b: x.repeat_interleave(torch.tensor([1, 2]), dim=b),
    "repeat tokens": lambda x, t, b: x.repeat_interleave(2, t - x.dim()),
    "roll": lambda x, t, b: x.roll(2, t),
    "clone": lambda x, t, b: x.clone(),
    "detach": lambda x, t, b: x.detach(),
    "copy to the device": lambda x, t, b: x.to("cpu", copy=True),
    "same dtype": lambda x, t, b: x.to(x.dtype),
    "deepcopy": lambda x, t, b: copy.deepcopy(x),
}
