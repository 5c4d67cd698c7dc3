"""The sum of clipped per-record gradients, four exact ways: book-keeping, Opacus' hooks and ghost, whole-model vmap.

Book-keeping follows Bu et al. 2023, "Differentially Private Optimization on Large Model at Small Cost" (arXiv
2210.00038): one backward pass that stops at every layer's output, the norm of each record's gradient from what the
layer saw, then one clipped weight-gradient pass. Gradients per record exist for one layer at a time, where that is
cheaper than going without; small ones are kept for the sum, large ones gone when their norm is known.

Norms come from formulas that can cancel: what positions of one record add may nearly annul. Such norms are taken again
in float64, and a record is clipped by its norm plus what rounding can have added to its sum.

A loss is `loss(model, *batch)`, one number per image (N,); every tensor of the batch has the images first. A network
may see a multiple of N rows (a discriminator sees each record's real and made image): row j belongs to image j mod N.
A record is an image, or, with `owners`, a subject: the gradients of its images are summed, then clipped once.
"""

from contextlib import contextmanager

import torch
from torch import nn
from torch.func import functional_call, grad_and_value, vmap

METHODS = ("bookkeeping", "hooks", "ghost", "vmap")
CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)
NORMS = (nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm2d)
AT_ONCE = 4_000_000  # numbers per instantiation: larger blocks are mapped anew by the allocator, at a cost of their own
CANCELLED = 1e-3  # a squared norm below this share of its Cauchy-Schwarz bound has lost digits in float32
ROUNDING = 4  # in units of the last place of what a record's positions reach together
KEPT = 32_000_000  # numbers of a layer's gradients that are kept rather than computed again
PENALTY = "The loss takes gradients of its own (a gradient penalty), which have no clipped form here; leave it out."
OVERWRITTEN = "What a layer was given or gave is changed in place afterwards; build the model without in-place layers."


def clipped_sum(model, loss, batch, max_grad_norm, method="bookkeeping", owners=None):
    """Sum over records of each record's gradient scaled to norm at most `max_grad_norm`.

    `owners` (N,) numbers the records from 0, none left out, and says whose each image is; None: each image is a record.
    Returns a dict parameter -> sum (shape of the parameter), the losses (N,), detached, and the records' norms before
    clipping (R,). `method` is one of METHODS; see `best_method`.
    """
    methods = dict(zip(METHODS, (_bookkeeping, _hooks, _ghost_clipping, _vmap)))
    if method not in methods:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, not {method!r}.")
    gradients, losses, norms = methods[method](model, loss, batch, max_grad_norm, Records(len(batch[0]), owners))
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
    """min(1, C / norm) per record (R,)."""
    return (max_grad_norm / norms.clamp_min(1e-12)).clamp(max=1.0)


class Records:
    """Which rows of a layer belong to which record of a batch of `n` images."""

    def __init__(self, n, owners=None):
        self.n, self.owners = n, owners
        if owners is None:
            self.count = n
            return
        sizes = torch.bincount(owners)
        if len(owners) != n or (sizes == 0).any():
            raise ValueError("owners needs one number per image, the records counted from 0 without a gap.")
        self.count = len(sizes)
        order = owners.argsort(stable=True)
        starts = sizes.cumsum(0) - sizes
        # records of equal size go together: exact, and no record is padded to the size of the largest
        self.by_size = []
        for size in sizes.unique().tolist():
            records = (sizes == size).nonzero().flatten()
            images = order[starts[records, None] + torch.arange(size, device=owners.device)]
            self.by_size.append((records, images))

    def blocks(self, *tensors):
        """Pairs (records, tensors (R', rows of each, ...)) that together hold every row of tensors (k N, ...)."""
        k = len(tensors[0]) // self.n
        if self.owners is None:
            return [(slice(None), [t.unflatten(0, (k, self.n)).transpose(0, 1) for t in tensors])]
        step = self.n * torch.arange(k, device=self.owners.device)
        return [
            (records, [t[(images[:, None] + step[:, None]).flatten(1)] for t in tensors])
            for records, images in self.by_size
        ]

    def sum(self, rows):
        """(k N, ...) to (R, ...): a record's rows add up."""
        images = rows if len(rows) == self.n else rows.unflatten(0, (-1, self.n)).sum(0)
        if self.owners is None:
            return images
        return images.new_zeros(self.count, *images.shape[1:]).index_add_(0, self.owners, images)

    def of_rows(self, values, rows):
        """Values (R,) of the records as values (k N,) of their rows."""
        values = values if self.owners is None else values[self.owners]
        return values.repeat(rows // self.n)


# ---- book-keeping ---------------------------------------------------------------------------------------------------


def _bookkeeping(model, loss, batch, max_grad_norm, records):
    if unknown := unknown_layers(model):
        raise ValueError(f"Book-keeping does not know the layer {unknown[0]}; use method='vmap' for this model.")
    layers = [layer for layer in model.modules() if _trains(layer)]
    losses, seen = _forward_backward(model, layers, loss, batch)
    # of each record: the squared norm of its gradient, and of what its positions reach if they do not annul
    squared, reach = torch.zeros(2, records.count, dtype=torch.float64, device=losses.device)
    kept = {layer: _add_squared_norms(squared, reach, layer, *seen[layer], records) for layer in layers}
    norms = squared.sqrt()
    rounding = ROUNDING * torch.finfo(losses.dtype).eps * reach.sqrt()
    factors = clip_factors(norms + rounding, max_grad_norm).to(losses.dtype)
    gradients = {}
    for layer in layers:
        gradients |= _weighted_gradient(layer, *seen.pop(layer), factors, records, kept.pop(layer))
    return gradients, losses, norms


def _forward_backward(model, layers, loss, batch):
    """Losses (N,) and, per layer, its inputs and the gradients of the summed loss at its outputs, all uses in one."""
    uses, slopes, rows = {layer: [] for layer in layers}, {}, [len(batch[0])]

    def remember(layer, args, output):
        if len(args[0]) not in rows:  # windows or tokens folded into the batch: whose row is whose is lost
            raise ValueError(f"A {type(layer).__name__} sees other rows than the model is given; use method='vmap'.")
        use = layer, len(uses[layer])
        uses[layer].append((args[0].detach(), args[0]._version))
        if not output.requires_grad:  # the first layer: its weights are frozen, so nothing before it needs a gradient
            output.requires_grad_()
        output.register_hook(lambda slope: slopes.__setitem__(use, slope.detach()))

    handles = [layer.register_forward_hook(remember) for layer in layers]
    handles.append(model.register_forward_pre_hook(lambda _, args: rows.extend(len(a) for a in args[:1])))
    try:
        with _frozen(layers):  # no weight gradients in the backward pass: they come clipped, once, afterwards
            losses = loss(model, *batch)
            if slopes:  # of a gradient that the loss took itself
                raise ValueError(PENALTY)
            losses.sum().backward()
    except RuntimeError as error:  # an activation in place on the output of a layer, whose weights are frozen here
        if "in-place" not in str(error) and "inplace" not in str(error):
            raise
        raise ValueError(OVERWRITTEN) from error
    finally:
        for handle in handles:
            handle.remove()
    return losses.detach(), {layer: _all_uses(layer, uses[layer], slopes) for layer in layers}


def _all_uses(layer, uses, slopes):
    """A layer's input and slope; several uses in one forward pass are more rows of the same images."""
    name = type(layer).__name__
    if any(x._version != version for x, version in uses):
        raise ValueError(OVERWRITTEN)
    if not uses or any((layer, i) not in slopes for i in range(len(uses))):
        raise ValueError(f"The loss does not depend on a {name} of this model; freeze it or use it.")
    if len({x.shape[1:] for x, _ in uses}) > 1:
        raise ValueError(f"A {name} is used twice with different shapes; use method='vmap'.")
    if len(uses) == 1:
        return uses[0][0], slopes[layer, 0]
    return torch.cat([x for x, _ in uses]), torch.cat([slopes[layer, i] for i in range(len(uses))])


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


def _add_squared_norms(squared, reach, layer, x, slope, records):
    """Adds each record's squared norm in this layer to `squared` (R,), and what bounds its rounding to `reach` (R,).

    Gives what was instantiated of the weight's gradients on the way, if it is small: pairs (records, gradients).
    """
    if isinstance(layer, NORMS):
        for rows in _norm_gradients(layer, x, slope):
            squared += records.sum(rows).square().sum(1)
        reach += _norm_reach(layer, x, slope, records)
        return None
    kept, few = [], records.count * layer.weight.numel() <= KEPT
    for which, (inputs, slopes) in records.blocks(x, slope):
        norms, bounds, gradients = _weight_norms(layer, inputs, slopes, few)
        squared[which] += norms
        reach[which] += bounds
        kept.append((which, gradients))
    if getattr(layer, "bias", None) is not None:
        squared += records.sum(_over_positions(layer, slope)).square().sum(1)
        reach += _positions(layer, slope, records) * records.sum(slope.square().flatten(1).sum(1))
    return kept if all(gradients is not None for _, gradients in kept) else None


def _positions(layer, slope, records):
    """The most positions that a record's gradient of a bias sums over (Cauchy-Schwarz)."""
    most = 1 if records.owners is None else int(torch.bincount(records.owners).max())
    per_row = slope[0].numel() // slope.shape[-1 if isinstance(layer, nn.Linear) else 1]
    return per_row * most * (len(slope) // records.n)


def _norm_reach(layer, x, slope, records):
    positions = slope[0].numel() * (len(slope) // records.n) // layer.weight.numel()
    if records.owners is not None:
        positions *= int(torch.bincount(records.owners).max())
    scaled = sum(t.square().flatten(1).sum(1) for t in (slope * _normal(layer, x), slope))
    return positions * records.sum(scaled)


def _weight_norms(layer, x, slope, keep):
    """Of the weight's gradient, from what records saw (R, rows, ...) and their slopes: squared norms (R,), bounds (R,).

    Bounds are the squares of what all positions reach together. And the gradients (R, ...) themselves where they were
    instantiated and `keep` asks for them, else None.
    """
    if isinstance(layer, CONVOLUTIONS):
        return _convolution_norms(layer, x, slope, keep)
    slope = slope.reshape(len(slope), -1, slope.shape[-1])
    if isinstance(layer, nn.Embedding):
        x = x.reshape(len(x), -1)
        same = (x[:, :, None] == x[:, None, :]) & _counts(layer, x)[:, :, None]
        slope = slope.double()
        return ((slope @ slope.mT) * same).sum((1, 2)), slope.shape[1] * slope.square().sum((1, 2)), None
    return *_ghost_norms(x.reshape(len(x), -1, x.shape[-1]), slope), None


def _ghost_norms(x, slope):
    """Squared Frobenius norm of x^T slope per record, from (R, T, p) and (R, T, o), without forming it; its bound."""
    if x.shape[1] == 1:  # one position, nothing to annul: the norm is its bound
        norms = ((x @ x.mT) * (slope @ slope.mT)).flatten()
        return norms, norms
    norms, bounds = _gram(x, slope)
    doubtful = norms < CANCELLED * bounds
    if doubtful.any():
        norms = norms.double()
        norms[doubtful] = _gram(x[doubtful].double(), slope[doubtful].double())[0].clamp_min(0)
    return norms, bounds


def _gram(x, slope):
    """Squared norms (R,) by the Gram matrices of both, and |x|^2 |slope|^2 (R,), which they cannot pass."""
    x, slope = x @ x.mT, slope @ slope.mT
    trace = lambda gram: gram.diagonal(dim1=1, dim2=2).sum(1)  # noqa: E731
    return (x * slope).sum((1, 2)), trace(x) * trace(slope)


def _convolution_norms(layer, x, slope, keep):
    """By the cheaper of two exact ways: T positions, p inputs per position, o outputs. See `_weight_norms`."""
    if isinstance(layer, nn.ConvTranspose2d):  # its weight gradient is that of the convolution it transposes
        x, slope = slope, x
    rows, positions = x.shape[1], slope[0, 0, 0].numel()
    p, o = x.shape[2] * layer.weight[0, 0].numel(), slope.shape[2]
    if rows * positions * (p + o) < p * o:
        geometry = layer.kernel_size, layer.dilation, layer.padding, layer.stride
        patches = nn.functional.unfold(x.flatten(0, 1), *geometry).mT.unflatten(0, (-1, rows))
        return *_ghost_norms(patches.flatten(1, 2), slope.flatten(3).mT.flatten(1, 2)), None
    norms, kept, some = [], [], max(1, AT_ONCE // layer.weight.numel())
    for inputs, slopes in zip(x.split(some), slope.split(some)):
        gradients = vmap(lambda a, g: _convolution_weight(layer, a, g))(inputs, slopes)
        norms.append(gradients.flatten(1).square().sum(1))
        kept += [gradients] if keep else []
    norms = torch.cat(norms)
    if keep:  # the sum takes these very gradients: nothing can annul that their norm does not see
        return norms, norms, torch.cat(kept)
    return norms, layer.weight[0, 0].numel() * x.flatten(1).square().sum(1) * slope.flatten(1).square().sum(1), None


def _convolution_weight(layer, x, slope):
    """Weight gradient of the plain convolution with this layer's geometry, summed over the batch."""
    shape = (slope.shape[1], x.shape[1], *layer.kernel_size)
    return nn.grad.conv2d_weight(x, shape, slope, layer.stride, layer.padding, layer.dilation)


def _weighted_gradient(layer, x, slope, factors, records, kept):
    """Per trainable parameter the sum over rows of their record's factor x gradient."""
    slope = slope * records.of_rows(factors, len(slope)).view(-1, *[1] * (slope.dim() - 1))
    if isinstance(layer, NORMS):
        weights = [layer.weight] if layer.bias is None else [layer.weight, layer.bias]
        return {w: rows.sum(0).view_as(w) for w, rows in zip(weights, _norm_gradients(layer, x, slope))}
    if kept is not None:
        found = {layer.weight: sum(torch.tensordot(factors[which], g, 1) for which, g in kept)}
    else:
        found = {layer.weight: _summed_weight(layer, x, slope)}
    if getattr(layer, "bias", None) is not None:
        found[layer.bias] = _over_positions(layer, slope).sum(0)
    return found


def _summed_weight(layer, x, slope):
    if isinstance(layer, CONVOLUTIONS):
        swap = isinstance(layer, nn.ConvTranspose2d)
        return _convolution_weight(layer, *((slope, x) if swap else (x, slope)))
    slope = slope.flatten(0, -2)
    if isinstance(layer, nn.Embedding):
        x = x.flatten()
        return torch.zeros_like(layer.weight).index_add_(0, x, slope * _counts(layer, x)[:, None])
    return slope.mT @ x.flatten(0, -2)


def _counts(layer, index):
    """Whether an index of an embedding has a gradient: the padding has none."""
    return index != (-1 if layer.padding_idx is None else layer.padding_idx)


def _norm_gradients(layer, x, slope):
    """Per row the gradients of scale and, where there is one, shift, both flat: (rows, C)."""
    if isinstance(layer, nn.LayerNorm):
        fold = lambda t: t.reshape(len(t), -1, layer.weight.numel()).sum(1)  # noqa: E731
    else:
        fold = lambda t: _over_positions(layer, t)  # noqa: E731
    return [fold(slope * _normal(layer, x))] + ([fold(slope)] if layer.bias is not None else [])


def _normal(layer, x):
    """What the layer multiplies with its scale."""
    if isinstance(layer, nn.LayerNorm):
        return nn.functional.layer_norm(x, layer.normalized_shape, eps=layer.eps)
    groups = layer.num_groups if isinstance(layer, nn.GroupNorm) else layer.num_features
    return nn.functional.group_norm(x, groups, eps=layer.eps)


def _over_positions(layer, slope):
    """(rows, o, ...) to (rows, o) by summing over positions; a Linear has its features last."""
    if isinstance(layer, nn.Linear):
        return slope if slope.dim() == 2 else slope.reshape(len(slope), -1, slope.shape[-1]).sum(1)
    return slope.reshape(*slope.shape[:2], -1).sum(2)


def _trains(layer):
    return any(p.requires_grad for p in layer.parameters(recurse=False))


def _is_known(layer):
    """Exact types only: a subclass may compute otherwise, and a parametrised weight is not a weight."""
    own = dict(layer.named_parameters(recurse=False))
    if not own.keys() <= {"weight", "bias"} or not all(p.requires_grad for p in own.values()):
        return False
    if type(layer) in CONVOLUTIONS:
        plain = layer.groups == 1 and not isinstance(layer.padding, str) and layer.padding_mode == "zeros"
        return plain and all(more < stride for more, stride in zip(layer.output_padding, layer.stride))
    if type(layer) is nn.Embedding:
        return layer.max_norm is None and not layer.scale_grad_by_freq and not layer.sparse
    if type(layer) is nn.InstanceNorm2d:
        return not layer.track_running_stats
    return type(layer) in (nn.Linear, nn.GroupNorm, nn.LayerNorm)


# ---- Opacus' hooks and ghost clipping -------------------------------------------------------------------------------


def _hooks(model, loss, batch, max_grad_norm, records):
    from opacus import GradSampleModule

    _mend_opacus()
    wrapped = GradSampleModule(model, loss_reduction="sum")
    try:
        losses = loss(wrapped, *batch)
        losses.sum().backward()
        samples = {p: p.grad_sample for p in model.parameters() if p.requires_grad}
        return _clip_and_sum(samples, losses.detach(), max_grad_norm, records)
    finally:
        _clean(model)
        wrapped.to_standard_module()


def _ghost_clipping(model, loss, batch, max_grad_norm, records):
    """Two backward passes: the first for norms alone, the second through the losses weighted by the clip factors."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    _mend_opacus()
    if records.owners is not None:
        raise ValueError("Opacus' ghost clipping knows images only; use method='bookkeeping' for subjects.")
    wrapped = GradSampleModuleFastGradientClipping(model, max_grad_norm=max_grad_norm, loss_reduction="sum")
    try:
        losses = loss(wrapped, *batch)
        losses.sum().backward(retain_graph=True)
        norms = _ghost_sample_norms(model, records.n)
        wrapped.disable_hooks()
        model.zero_grad()
        (losses * clip_factors(norms, max_grad_norm).to(losses.dtype)).sum().backward()
        return {p: p.grad for p in model.parameters() if p.requires_grad}, losses.detach(), norms
    finally:
        _clean(model)
        wrapped.to_standard_module()


def _ghost_sample_norms(model, n):
    found = [getattr(p, "_norm_sample", None) for p in model.parameters() if p.requires_grad]
    if any(norm is None or len(norm) != n for norm in found):
        raise ValueError(
            "Opacus' ghost clipping gave no norm per image, as where a network sees several rows an image or attends "
            "over windows; use method='bookkeeping' or 'vmap'."
        )
    return torch.stack(found).double().norm(dim=0)


def _mend_opacus():
    """Opacus 1.6 reads convolution inputs as if contiguous and is silently wrong on channels_last."""
    from opacus.grad_sample import register_grad_sampler
    from opacus.grad_sample.conv import compute_conv_grad_sample

    @register_grad_sampler([nn.Conv2d])
    def contiguous(layer, activations, backprops):
        return compute_conv_grad_sample(layer, [activations[0].contiguous()], backprops.contiguous())


def _clip_and_sum(samples, losses, max_grad_norm, records):
    for p, sample in samples.items():
        if sample is None or len(sample) % records.n:
            raise ValueError(
                f"Opacus' hooks gave no gradient per record for a weight of shape {tuple(p.shape)}, as with window "
                "attention (Swin); use method='vmap' for this model."
            )
    samples = {p: records.sum(sample) for p, sample in samples.items()}
    norms = torch.stack([s.flatten(1).double().norm(dim=1) for s in samples.values()]).norm(dim=0)
    factors = clip_factors(norms, max_grad_norm).to(losses.dtype)
    return {p: torch.tensordot(factors, s, 1) for p, s in samples.items()}, losses, norms


def _clean(model):
    """Per-record gradients are private: none may outlive the step, least of all in a saved model."""
    for p in model.parameters():
        p.grad = None
        for name in ("grad_sample", "_norm_sample"):
            if hasattr(p, name):
                delattr(p, name)


# ---- whole-model vmap -----------------------------------------------------------------------------------------------


def _vmap(model, loss, batch, max_grad_norm, records):
    """Exact for any model that treats each record alone, Swin too; holds records x weights numbers."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    fixed = {name: t for name, t in [*model.named_parameters(), *model.named_buffers()] if name not in trained}

    def one(weights, *record):
        network = lambda *args, **kwargs: functional_call(model, weights | fixed, args, kwargs)  # noqa: E731
        return loss(network, *(t[None] for t in record)).sum()

    weights = {name: p.detach() for name, p in trained.items()}
    dims = (None, *[0] * len(batch))
    gradients, losses = vmap(grad_and_value(one), in_dims=dims, randomness="different")(weights, *batch)
    samples = {trained[name]: g for name, g in gradients.items()}
    return _clip_and_sum(samples, losses.detach(), max_grad_norm, records)
