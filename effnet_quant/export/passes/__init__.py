"""Passes change a traced graph before a writer writes it.

Each pass is a function in its own file that changes a ``TracedGraph`` in place. ``passes_for`` lists the passes of a
target in their order.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from effnet_quant.export.options import ExportOptions
from effnet_quant.export.passes.batch_norm_folding import fold_batch_norm
from effnet_quant.export.passes.bias_rounding import quantize_biases
from effnet_quant.export.passes.constant_folding import fold_constants
from effnet_quant.export.passes.convolution_padding import merge_padding
from effnet_quant.export.passes.dead_code import remove_dead_code
from effnet_quant.export.passes.float_clipping import clip_before_rounding
from effnet_quant.export.passes.functional_form import make_functional
from effnet_quant.export.passes.gate_rounding import join_silu, round_gates
from effnet_quant.export.passes.half_scales import fit_scales_to_half
from effnet_quant.export.passes.hard_sigmoid import saturate_hard_sigmoids
from effnet_quant.export.passes.integer_encoding import encode_activations
from effnet_quant.export.passes.integer_pooling import pool_integers
from effnet_quant.export.passes.needed_ranges import quantize_layer_outputs
from effnet_quant.export.passes.repeated_rounding import merge_equal_quantizers
from effnet_quant.export.passes.rounding_order import round_before_activations
from effnet_quant.export.passes.weight_rounding import round_weights
from effnet_quant.export.traced_graph import TracedGraph
from effnet_quant.quantization.targets import Target

Pass = Callable[[TracedGraph], None]


def passes_for(target: Target, options: ExportOptions) -> list[Pass]:
    """The passes for a target and the options of a file, in order."""
    passes: list[Pass] = [make_functional, fold_constants, remove_dead_code, join_silu, merge_padding]
    passes.append(partial(encode_activations, target=target))
    if not options.float_weights:
        passes.append(round_weights)
    passes.append(fold_batch_norm)
    if (
        target.quantized_bias and not options.fp16
    ):  # the scale of an int32 bias, s_input * s_weight, is too small for float16
        passes.append(quantize_biases)
    if options.fp16:
        passes.append(fit_scales_to_half)
    passes.append(merge_equal_quantizers)
    if target.wide_activation_dtype is not None:
        passes.append(partial(clip_before_rounding, dtype=target.wide_activation_dtype, always=target.clips_wide))
    if target.quantized_outputs:
        passes += [partial(round_before_activations, dtype=target.activation_dtype), quantize_layer_outputs]
    else:
        passes.append(partial(clip_before_rounding, dtype=target.activation_dtype))
        if target.pools_integers:
            passes.append(pool_integers)
    if "silu" in target.quantized:
        passes += [round_gates, saturate_hard_sigmoids]
    return [*passes, remove_dead_code]


def run_passes(traced: TracedGraph, target: Target, options: ExportOptions) -> TracedGraph:
    """Run the passes for ``target`` on ``traced`` in place; returns ``traced``."""
    for change in passes_for(target, options):
        change(traced)
    traced.graph.lint()
    return traced
