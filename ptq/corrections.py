"""Corrections of one layer with the inputs that it really gets: regression, clipping, rounding, bias.

Each takes the moments of the layer's inputs in both streams (`moments`), and leaves the layer with
the range of its codes stored, a bias, and as its kernel the weights that were wanted, drawn into
their codes' cells: it rounds to the codes that were found, and training goes on from there.

  regression   w* = (covariance + r I)^-1 (cross + r I) w
               the weights that, on the quantized inputs, come nearest to the outputs of the float
               weights; r = (0.05 + 2 K / positions) * mean variance keeps them near w
  clipping     the range at which rounding costs the output least (`clipping.clip_weights`); before
               error feedback also its multiples
  rounding     nearest, error_feedback or adaround
  bias         b' = b + w^T mean_f - q^T mean_q                 the output's mean as in float
               (Nagel et al. 1906.04721, section 4.2, with measured means)
"""

import dataclasses

import numpy as np
from keras import ops

from lowbit import affine, clipping, layers, walk
from lowbit import spec as spec_lib
from ptq import adaround, error_feedback, moments

# Of the mean variance of the inputs.  A classifier sees as many positions as there are images, fewer
# than its inputs: what it would be fitted to is noise, so the ridge grows with inputs per position.
RIDGE = 0.05
RIDGE_PER_TAP = 2.0
DAMPING_PER_TAP = 0.1
# Of the range that rounding to nearest likes best: what a narrower one clips, feedback makes up for.
REFINEMENT = (1.0, 0.85, 0.92, 1.08, 1.2)
# Of a scale: how far from its code a weight may lie; 0.5 is the tie.
CELL = 0.45


@dataclasses.dataclass(frozen=True)
class Settings:
    """Which corrections a layer gets."""

    rounding: str = "nearest"  # or error_feedback, or adaround
    regression: bool = False
    clipping: bool = False
    bias: bool = True


def correct(step: walk.Step, settings: Settings, seed: int = 0) -> None:
    """Corrects a step's layer in place; the bias of before stays where `settings.bias` is False.

    Args:
      step: from `walk.walk`; its layer has weight_range "stored" and a bias.
      settings: what is done.
      seed: of the positions that are drawn.
    """
    layer, spec = step.layer, step.layer.weight_spec
    if isinstance(layer, layers.QuantizedConv2DTranspose) or getattr(layer, "groups", 1) > 1:
        return  # `moments` reads the taps of whole and of depthwise convolutions
    if step.calls > 1:  # the inputs of its later calls are not known yet: nothing is fitted
        settings = dataclasses.replace(settings, regression=False, bias=False)
    needs_products = settings != Settings(bias=settings.bias)
    observed = moments.observe(layer, step.inputs(), seed, only_means=not needs_products)
    kernel, bias = (np.float64(ops.convert_to_numpy(x)) for x in step.float_layer.folded())
    weights = moments.grouped(layer, kernel)
    replaced = kept = weights
    if spec is not None:
        hessian = None
        if needs_products:
            damping = error_feedback.DAMPING + DAMPING_PER_TAP * weights.shape[1] / observed.count
            hessian = error_feedback.damped(observed.covariance, damping)
        target = regression(weights, observed) if settings.regression else weights
        input_quantizer = layer.input_quantizer()
        floor = None
        if input_quantizer is not None and input_quantizer.spec is not None and spec.symmetric:
            input_scale = np.float32(input_quantizer.scale_and_zero_point()[0])
            # The bias of before and, but for rounding, of after: neither may raise the scale later.
            drift = np.einsum("gko,gk->go", weights, observed.mean_f - observed.mean_q)
            largest = np.maximum(np.abs(bias), np.abs(bias + drift.reshape(-1)))
            bits = input_quantizer.spec.bits
            floor = affine.minimum_weight_scale(np.float32(1.05 * largest), input_scale, bits)
        try:
            codes, scale, zero_point = quantize(target, hessian, spec, settings, floor)
        except np.linalg.LinAlgError as error:
            raise ValueError(
                f"layer {layer.name}: the covariance of its inputs is singular ({error}); calibrate "
                "on more images, or leave error_feedback out of --corrections"
            ) from error
        replaced = codes * scale[:, None, :]
        lowest, highest = affine.integer_bounds(spec)
        low, high = ((bound - zero_point) * scale for bound in (lowest, highest))
        reach = CELL * scale[:, None, :]
        # Beyond the range the gradient would be zero for good.
        kept = np.clip(target, replaced - reach, replaced + reach)
        kept = np.clip(kept, low[:, None, :], high[:, None, :])
        low, high = low.reshape(-1), high.reshape(-1)
        if spec.axis is None:
            low, high = low[:1], high[:1]
        layer.store_range(np.float32(low), np.float32(high))
    if settings.bias:
        ours, wanted = (
            np.einsum("gko,gk->go", *terms)
            for terms in ((replaced, observed.mean_q), (weights, observed.mean_f))
        )
        layer.bias.assign((bias + (wanted - ours).reshape(-1)).astype(np.float32))
    layer.kernel.assign(moments.ungrouped(layer, kept).astype(np.float32))


def regression(weights: np.ndarray, observed: moments.Moments) -> np.ndarray:
    """Returns w* of the formula at the top, (G, K, O)."""
    ridge = RIDGE + RIDGE_PER_TAP * weights.shape[1] / observed.count
    lift = error_feedback.lift(observed.covariance, ridge)
    return np.linalg.solve(observed.covariance + lift, (observed.cross + lift) @ weights)


def quantize(weights, hessian, spec: spec_lib.QuantSpec, settings: Settings, floor=None):
    """Returns codes less zero point (G, K, O), and their scale and zero point, (G, O) each.

    Args:
      weights: float64 (G, K, O).
      hessian: float64 (G, K, K); None where weights are rounded to nearest in their own range.
      spec: of the weights; `axis` None shares one scale.
      floor: None, or the smallest scale of each output, float32 (G * O,).
    """
    groups, taps, outputs = weights.shape
    flat = np.float32(weights.transpose(1, 0, 2).reshape(taps, -1))
    per_channel = spec.axis is not None
    flat_spec = dataclasses.replace(spec, axis=1 if per_channel else None)
    if settings.clipping:
        # The diagonal alone where it is one for all outputs: it gives nearly all of the gain.
        moment = np.repeat(hessian, outputs, axis=0) if groups > 1 else np.diagonal(hessian[0])
        low, high = clipping.clip_weights(flat, flat_spec, moment)
    else:
        low, high = affine.observed_range(flat, flat_spec.axis)

    def grid(factor):
        """Returns scale and zero point, float64 (G, O), for the range times a factor."""
        bounds = (bound * np.float32(factor) for bound in (low, high))
        scale, zero_point = affine.scale_and_zero_point(*bounds, spec)
        if floor is not None:
            scale = np.maximum(scale, floor if per_channel else floor.max())
        found = (np.broadcast_to(np.float64(x), (groups * outputs,)) for x in (scale, zero_point))
        return tuple(x.reshape(groups, outputs) for x in found)

    scale, zero_point = grid(1.0)
    if settings.rounding == "nearest":
        return error_feedback.nearest(weights, scale, zero_point, spec), scale, zero_point
    if settings.rounding == "adaround":
        codes = adaround.rounded(weights, hessian, scale, zero_point, spec)
        return codes, scale, zero_point
    spread = error_feedback.feedback(hessian)
    best = None
    for factor in REFINEMENT if settings.clipping else (1.0,):
        scale, zero_point = grid(factor)
        codes = error_feedback.with_feedback(weights, spread, scale, zero_point, spec)
        cost = error_feedback.error(codes * scale[:, None, :] - weights, hessian)
        if not per_channel:
            cost = np.full_like(cost, cost.sum())
        trial = tuple(x[:, None, :] for x in (cost, scale, zero_point)) + (codes,)
        if best is not None:
            better = trial[0] < best[0]
            trial = tuple(np.where(better, a, b) for a, b in zip(trial, best, strict=True))
        best = trial
    _, scale, zero_point, codes = best
    scale, zero_point = scale[:, 0], zero_point[:, 0]
    codes = error_feedback.descend(codes, weights, hessian, scale, zero_point, spec)
    return codes, scale, zero_point
