"""The sum of clipped per-record gradients, three exact ways: book-keeping, Opacus' hooks, whole-model vmap.

Book-keeping follows Bu et al. 2023, "Differentially Private Optimization on Large Model at Small Cost" (arXiv
2210.00038): one backward pass that stops at every layer's output, the norm of each record's gradient from what the
layer saw, then one clipped weight-gradient pass. Gradients per record exist for one layer at a time, where that is
cheaper than going without, and are gone when its norm is known.

A loss is `loss(model, *batch)`, one number per record (N,); every tensor of the batch has the records first. A network
may see a multiple of N rows (a discriminator sees each record's real and made image): row j belongs to record j mod N.
"""

from contextlib import contextmanager

import torch
from torch import nn
from torch.func import functional_call, grad_and_value, vmap

CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)


def clipped_sum(model, loss, batch, max_grad_norm, method="bookkeeping"):
    """Sum over records of each record's gradient scaled to norm at most `max_grad_norm`.

    Returns a dict parameter -> sum (shape of the parameter), the losses (N,), detached, and the norms before clipping
    (N,). `method` is "bookkeeping", "hooks" or "vmap"; see `best_method`.
    """
    methods = {"bookkeeping": _bookkeeping, "hooks": _hooks, "vmap": _vmap}
    if method not in methods:
        raise ValueError(f"method must be one of {', '.join(methods)}, not {method!r}.")
    gradients, losses, norms = methods[method](model, loss, batch, max_grad_norm)
    if not torch.isfinite(norms).all():
        raise ValueError("A record's gradient is not finite and cannot be clipped: lower lr or check the images.")
    return gradients, losses, norms


def best_method(model):
    """The fastest exact method: book-keeping where it knows every layer with weights, else vmap."""
    return "bookkeeping" if not unknown_layers(model) else "vmap"


def unknown_layers(model):
    """Names of the layers with trainable weights that book-keeping cannot handle."""
    return [name for name, layer in model.named_modules() if _trains(layer) and not _is_known(layer)]


def clip_factors(norms, max_grad_norm):
    """min(1, C / norm) per record (N,)."""
    return (max_grad_norm / norms.clamp_min(1e-12)).clamp(max=1.0)


# ---- book-keeping ---------------------------------------------------------------------------------------------------


def _bookkeeping(model, loss, batch, max_grad_norm):
    if unknown := unknown_layers(model):
        raise ValueError(f"Book-keeping does not know the layer {unknown[0]}; use method='vmap' for this model.")
    layers = [layer for layer in model.modules() if _trains(layer)]
    losses, seen = _forward_backward(model, layers, loss, batch)
    n = len(losses)
    squared = torch.zeros(n, dtype=torch.float64, device=losses.device)
    for layer in layers:
        squared += sum(s.double() for s in _squared_norms(layer, *seen[layer], n))
    factors = clip_factors(squared.sqrt(), max_grad_norm).to(losses.dtype)
    gradients = {}
    for layer in layers:
        gradients |= _weighted_gradient(layer, *seen[layer], factors)
    return gradients, losses, squared.sqrt()


def _forward_backward(model, layers, loss, batch):
    """Losses (N,) and, per layer, its input and the gradient of the summed loss at its output."""
    inputs, slopes, rows = {}, {}, []

    def remember(layer, args, output):
        if layer in inputs:
            raise ValueError(f"A {type(layer).__name__} is used twice in one forward pass; use method='vmap'.")
        if len(args[0]) != rows[0]:  # windows or tokens folded into the batch: whose row is whose is lost
            raise ValueError(f"A {type(layer).__name__} sees other rows than the model is given; use method='vmap'.")
        inputs[layer] = args[0].detach()
        if (
            not output.requires_grad
        ):  # the first layer: its weights are frozen here, so nothing before it needs a gradient
            output.requires_grad_()
        output.register_hook(lambda slope: slopes.__setitem__(layer, slope.detach()))

    handles = [layer.register_forward_hook(remember) for layer in layers]
    handles.append(model.register_forward_pre_hook(lambda _, args: rows.append(len(args[0]))))
    try:
        with _frozen(layers):  # no weight gradients in the backward pass: they come clipped, once, afterwards
            losses = loss(model, *batch)
            losses.sum().backward()
    finally:
        for handle in handles:
            handle.remove()
    if missing := [type(layer).__name__ for layer in layers if layer not in slopes]:
        raise ValueError(f"The loss does not depend on a {missing[0]} of this model; freeze it or use it.")
    return losses.detach(), {layer: (inputs[layer], slopes[layer]) for layer in layers}


@contextmanager
def _frozen(layers):
    weights = [p for layer in layers for p in layer.parameters(recurse=False) if p.requires_grad]
    for p in weights:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in weights:
            p.requires_grad_(True)


def _squared_norms(layer, x, slope, n):
    """Squared norm of each record's gradient (N,), one item per trainable parameter of the layer."""
    if isinstance(layer, nn.GroupNorm):
        scale, shift = _norm_gradients(layer, x, slope)
        yield _per_record(scale, n).square().sum(1)
        yield _per_record(shift, n).square().sum(1)
        return
    yield (_convolution_norm(layer, x, slope, n) if isinstance(layer, CONVOLUTIONS) else _linear_norm(x, slope, n))
    if layer.bias is not None:
        yield _per_record(_over_positions(layer, slope), n).square().sum(1)


def _linear_norm(x, slope, n):
    """|x|^2 |slope|^2 for one vector a record; with several the Gram matrices of both carry the cross terms."""
    return _ghost(*(_join_rows(t.reshape(len(t), -1, t.shape[-1]), n) for t in (x, slope)))


def _over_positions(layer, slope):
    """(rows, o, ...) to (rows, o) by summing over positions; a Linear has its features last."""
    if isinstance(layer, nn.Linear):
        return slope.reshape(len(slope), -1, slope.shape[-1]).sum(1)
    return slope.reshape(*slope.shape[:2], -1).sum(2)


def _ghost(x, slope):
    """Squared Frobenius norm of x^T slope per record, from (N, T, p) and (N, T, o), without forming it."""
    return ((x @ x.mT) * (slope @ slope.mT)).sum((1, 2))


def _convolution_norm(layer, x, slope, n):
    """By the cheaper of two exact ways: T positions, p inputs per position, o outputs."""
    if isinstance(layer, nn.ConvTranspose2d):  # its weight gradient is that of the convolution it transposes
        x, slope = slope, x
    rows, positions = len(x) // n, slope[0, 0].numel()
    p, o = x.shape[1] * layer.weight[0, 0].numel(), slope.shape[1]
    if rows * positions * (p + o) < p * o:
        patches = nn.functional.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride).mT
        return _ghost(_join_rows(patches, n), _join_rows(slope.flatten(2).mT, n))
    gradients = vmap(lambda a, g: _convolution_weight(layer, a[None], g[None]))(x, slope)
    return _per_record(gradients.flatten(1), n).square().sum(1)


def _convolution_weight(layer, x, slope):
    """Weight gradient of the plain convolution with this layer's geometry, summed over the batch."""
    shape = (slope.shape[1], x.shape[1], *layer.kernel_size)
    return nn.grad.conv2d_weight(x, shape, slope, layer.stride, layer.padding, layer.dilation)


def _weighted_gradient(layer, x, slope, factors):
    """Per trainable parameter the sum over rows of factor x gradient."""
    n = len(factors)
    slope = slope * factors.repeat(len(slope) // n).view(-1, *[1] * (slope.dim() - 1))
    if isinstance(layer, nn.GroupNorm):
        scale, shift = _norm_gradients(layer, x, slope)
        return {layer.weight: scale.sum(0), layer.bias: shift.sum(0)}
    if isinstance(layer, nn.Linear):
        found = {layer.weight: slope.flatten(0, -2).mT @ x.flatten(0, -2)}
    else:
        swap = isinstance(layer, nn.ConvTranspose2d)
        found = {layer.weight: _convolution_weight(layer, *((slope, x) if swap else (x, slope)))}
    if layer.bias is not None:
        found[layer.bias] = _over_positions(layer, slope).sum(0)
    return found


def _norm_gradients(layer, x, slope):
    """Per row the gradients of scale and shift, both (rows, C)."""
    normal = nn.functional.group_norm(x, layer.num_groups, eps=layer.eps)
    return _over_positions(layer, slope * normal), _over_positions(layer, slope)


def _per_record(rows, n):
    """(rows, d) to (N, d): a record's rows add up."""
    return rows.unflatten(0, (-1, n)).sum(0)


def _join_rows(rows, n):
    """(rows, T, d) to (N, rows per record x T, d): a record's rows are just more positions."""
    return rows.unflatten(0, (-1, n)).transpose(0, 1).flatten(1, 2)


def _trains(layer):
    return any(p.requires_grad for p in layer.parameters(recurse=False))


def _is_known(layer):
    whole = all(p.requires_grad for p in layer.parameters(recurse=False))
    if isinstance(layer, CONVOLUTIONS):
        return whole and layer.groups == 1 and not isinstance(layer.padding, str) and layer.padding_mode == "zeros"
    return whole and type(layer) in (nn.Linear, nn.GroupNorm)


# ---- Opacus' hooks --------------------------------------------------------------------------------------------------


def _hooks(model, loss, batch, max_grad_norm):
    wrapped = _opacus(model)
    try:
        losses = loss(wrapped, *batch)
        losses.sum().backward()
        samples = {p: p.grad_sample for p in model.parameters() if p.requires_grad}
        return _clip_and_sum(samples, losses.detach(), max_grad_norm)
    finally:
        _clean(model)
        wrapped.to_standard_module()


def _opacus(model):
    """Wraps for Opacus 1.6, which reads convolution inputs as if contiguous and is silently wrong on channels_last."""
    from opacus import GradSampleModule
    from opacus.grad_sample import register_grad_sampler
    from opacus.grad_sample.conv import compute_conv_grad_sample

    @register_grad_sampler([nn.Conv2d])
    def contiguous(layer, activations, backprops):
        return compute_conv_grad_sample(layer, [activations[0].contiguous()], backprops.contiguous())

    return GradSampleModule(model, loss_reduction="sum")


def _clip_and_sum(samples, losses, max_grad_norm):
    n = len(losses)
    for p, sample in samples.items():
        if sample is None or len(sample) % n:
            raise ValueError(
                f"Opacus' hooks gave no gradient per record for a weight of shape {tuple(p.shape)}, as with window "
                "attention (Swin); use method='vmap' for this model."
            )
    samples = {p: sample.unflatten(0, (-1, n)).sum(0) for p, sample in samples.items()}
    norms = torch.stack([s.flatten(1).double().norm(dim=1) for s in samples.values()]).norm(dim=0)
    factors = clip_factors(norms, max_grad_norm).to(losses.dtype)
    return {p: torch.tensordot(factors, s, 1) for p, s in samples.items()}, losses, norms


def _clean(model):
    """Per-record gradients are private: none may outlive the step, least of all in a saved model."""
    for p in model.parameters():
        p.grad = None
        if hasattr(p, "grad_sample"):
            del p.grad_sample


# ---- whole-model vmap -----------------------------------------------------------------------------------------------


def _vmap(model, loss, batch, max_grad_norm):
    """Exact for any model that treats each record alone, Swin too; holds records x weights numbers."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    fixed = {name: t for name, t in [*model.named_parameters(), *model.named_buffers()] if name not in trained}

    def one(weights, *record):
        network = lambda *args: functional_call(model, weights | fixed, args)  # noqa: E731
        return loss(network, *(t[None] for t in record)).sum()

    weights = {name: p.detach() for name, p in trained.items()}
    dims = (None, *[0] * len(batch))
    gradients, losses = vmap(grad_and_value(one), in_dims=dims, randomness="different")(weights, *batch)
    return _clip_and_sum({trained[name]: g for name, g in gradients.items()}, losses.detach(), max_grad_norm)
