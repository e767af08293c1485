"""Token losses and confidences on logits that are cut over the vocabulary ([N, V/tp] on each rank)."""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

from ee_scale.config.groups import LIGER


def mask_padding(logits: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Logits [..., V/tp] with the padded rows of the vocabulary at the lowest value, so that no softmax sees them."""
    first = parallel_state.get_tensor_model_parallel_rank() * logits.shape[-1]
    valid = min(max(vocab_size - first, 0), logits.shape[-1])
    if valid == logits.shape[-1]:
        return logits
    padding = torch.arange(logits.shape[-1], device=logits.device) >= valid
    return logits.masked_fill(padding, torch.finfo(logits.dtype).min)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, kernel: str = "torch") -> torch.Tensor:
    """Next-token loss per token: logits [N, V/tp], labels [N] -> fp32 [N]. May overwrite the logits."""
    if kernel == LIGER:
        return _liger_cross_entropy(logits, labels)
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        return vocab_parallel_cross_entropy(logits, labels)
    return _CrossEntropy.apply(logits, labels)


def _liger_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """On whole logits, which become their own gradient."""
    from liger_kernel.ops import LigerCrossEntropyFunction  # an extra, and Triton with it

    ignored, z_loss, smoothing = -100, 0.0, 0.0
    return LigerCrossEntropyFunction.apply(logits, labels, None, ignored, z_loss, smoothing, "none")[0].float()


class _CrossEntropy(torch.autograd.Function):
    """On whole logits, one backward. Its gradient takes the place of the log-probabilities; torch's own makes two more
    tensors of this size, and Megatron's sums over one rank are calls."""

    @staticmethod
    def forward(ctx, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        log_p = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
        ctx.save_for_backward(log_p, labels.unsqueeze(-1))
        ctx.dtype = logits.dtype
        return -log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        log_p, places = ctx.saved_tensors
        gradient = log_p.exp_()  # nothing else reads it
        gradient.scatter_add_(-1, places, gradient.new_full(places.shape, -1.0))
        return gradient.mul_(grad.unsqueeze(-1)).to(ctx.dtype), None


def log_normalizer(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(largest logit, log sum exp) over the whole vocabulary, fp32 [N] each."""
    group = parallel_state.get_tensor_model_parallel_group()
    largest = logits.max(dim=-1).values
    if group.size() > 1:
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    total = (logits - largest.unsqueeze(-1)).exp().sum(dim=-1)
    if group.size() > 1:
        dist.all_reduce(total, group=group)
    return largest, largest + total.log()


@torch.no_grad()
def confidence(logits: torch.Tensor) -> torch.Tensor:
    """Largest softmax probability over the whole vocabulary: [N, V/tp] -> fp32 [N]."""
    largest, normalizer = log_normalizer(logits.float())
    return (largest - normalizer).exp()


class _KLDivergence(torch.autograd.Function):
    """KL(teacher || student) per token; gradient softmax(student) - softmax(teacher)."""

    @staticmethod
    def forward(ctx, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        student, teacher = student.float(), teacher.float()
        log_p = student - log_normalizer(student)[1].unsqueeze(-1)
        log_q = teacher - log_normalizer(teacher)[1].unsqueeze(-1)
        q = log_q.exp()
        # A padded row has q = 0 and two very low logarithms, infinite at a temperature below 1: 0 x inf is no number.
        loss = torch.where(q == 0, 0.0, q * (log_q - log_p)).sum(dim=-1)
        if (group := parallel_state.get_tensor_model_parallel_group()).size() > 1:
            dist.all_reduce(loss, group=group)
        ctx.save_for_backward(log_p.exp() - q)
        return loss

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (difference,) = ctx.saved_tensors
        return difference * grad.unsqueeze(-1), None


def kl_divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """T^2 KL(softmax(teacher/T) || softmax(student/T)) per token (Hinton et al. 2015): [N, V/tp] twice -> fp32 [N]."""
    return _KLDivergence.apply(student / temperature, teacher.detach() / temperature) * temperature**2


@torch.no_grad()
def systematic_sample(logits: torch.Tensor, points: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What a cache keeps of a teacher: K = `count` tokens of each softmax(logits), int32 [N, K], and sum q log q, [N].

    logits [N, V/tp]; points [N] in [0, 1), fp64, the same on all tensor ranks. The tokens lie at (point + k) / K of the
    distribution function: over random points token v comes K q_v times on average (so its share is unbiased, unlike
    that of a cut to the largest; random sampling KD, arXiv 2503.16870), and never a whole time more or less than that.
    """
    logits, group = logits.float(), parallel_state.get_tensor_model_parallel_group()
    log_q = logits - log_normalizer(logits)[1].unsqueeze(-1)
    q = log_q.exp()
    negentropy = torch.where(q == 0, 0.0, q * log_q).sum(dim=-1)
    below = q.cumsum(dim=-1, dtype=torch.float64)
    masses = [torch.empty_like(points) for _ in range(group.size())]
    masses[group.rank()] = below[:, -1].contiguous()
    if group.size() > 1:
        dist.all_gather(masses, masses[group.rank()].clone(), group=group)
        dist.all_reduce(negentropy, group=group)
    ends = torch.stack(masses).cumsum(0)
    start = ends[group.rank()] - masses[group.rank()]
    steps = torch.arange(count, dtype=torch.float64, device=points.device)
    within = 1 - 1e-12  # rounding may not lead to a token without probability
    places = ((points.unsqueeze(-1) + steps) / count).clamp(max=within) * ends[-1].unsqueeze(-1)
    owner = torch.searchsorted(ends.t().contiguous(), places, right=True)
    own = torch.minimum((places - start.unsqueeze(-1)).clamp(min=0), below[:, -1:] * within)
    tokens = torch.searchsorted(below, own, right=True) + group.rank() * logits.shape[-1]
    tokens = torch.where(owner == group.rank(), tokens, 0).int()
    if group.size() > 1:
        dist.all_reduce(tokens, group=group)
    return tokens, negentropy


class _SampledKL(torch.autograd.Function):
    """KL estimated from K tokens of the teacher; gradient softmax(student) - counts / K, unbiased as they are."""

    @staticmethod
    def forward(ctx, student: torch.Tensor, tokens: torch.Tensor, negentropy: torch.Tensor) -> torch.Tensor:
        student, group = student.float(), parallel_state.get_tensor_model_parallel_group()
        log_p = student - log_normalizer(student)[1].unsqueeze(-1)
        local = tokens.long() - group.rank() * student.shape[-1]
        outside = (local < 0) | (local >= student.shape[-1])
        local, share = local.masked_fill(outside, 0), (~outside).float() / tokens.shape[-1]
        loss = log_p.gather(-1, local).masked_fill(outside, 0.0).mean(dim=-1)
        if group.size() > 1:
            dist.all_reduce(loss, group=group)
        ctx.save_for_backward(log_p.exp_().scatter_add_(-1, local, -share))
        return negentropy - loss

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (difference,) = ctx.saved_tensors
        return difference * grad.unsqueeze(-1), None, None


def sampled_kl(
    student: torch.Tensor, tokens: torch.Tensor, negentropy: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """As `kl_divergence`, from what `systematic_sample` drew of teacher / T: [N, V/tp], [N, K], [N] -> fp32 [N]."""
    return _SampledKL.apply(student / temperature, tokens, negentropy) * temperature**2
