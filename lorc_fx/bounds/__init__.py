"""Numerical bounds, each with its statement and proof: from one codec to attention, norms and activations.

``lorc_fx.certify`` puts them together for a whole model. Everything is in fp64; docs/theory.md is the text to it.
"""

from .attention import (
    distances,
    isometry,
    linearised_output_error,
    linearised_terms,
    output_error,
    product_error,
    score_error,
    softcap_error,
    total_variation,
    weight_error,
)
from .codecs import CodecError, code_rounding, codec_error, computed, quantisation_error, unprojected_error
from .matrices import (
    best_error,
    lorc_layer,
    lorc_network,
    relative_gain,
    rounded_by,
    spectral_norm,
    wedin,
    weyl,
)
from .pointwise import ACTIVATIONS, Activation, unit_vector_entries, unit_vectors
from .roundoff import accumulated, gamma, rounding_error, unit

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "CodecError",
    "accumulated",
    "best_error",
    "code_rounding",
    "codec_error",
    "computed",
    "distances",
    "gamma",
    "isometry",
    "linearised_output_error",
    "linearised_terms",
    "lorc_layer",
    "lorc_network",
    "output_error",
    "product_error",
    "quantisation_error",
    "relative_gain",
    "rounded_by",
    "rounding_error",
    "score_error",
    "softcap_error",
    "spectral_norm",
    "total_variation",
    "unit",
    "unit_vector_entries",
    "unit_vectors",
    "unprojected_error",
    "wedin",
    "weight_error",
    "weyl",
]
