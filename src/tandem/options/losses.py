"""Options of the DPO objective: the losses, and what goes with which."""

import dataclasses

from tandem.options.parsing import changed, flags, opt, refuse

LOSS_TYPES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
SMOOTHED_LOSSES = ("sigmoid", "robust", "exo_pair", "aot", "aot_unpaired")
F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
# The others need a β·log Z(x) to cancel that only reverse KL has; TRL 1.16 refuses them
F_DIVERGENCE_LOSSES = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")


@dataclasses.dataclass
class DPOOptions:
    """DPO."""

    beta: float = opt(0.1, "β: how strongly the policy is held to the reference")
    loss_type: list[str] = opt(["sigmoid"], "one TRL loss, or several to be added", choices=LOSS_TYPES)
    loss_weights: list[float] | None = opt(None, "weights of several losses")
    label_smoothing: float = opt(0.0, "share of labels taken for flipped; with sigmoid this is cDPO")
    f_divergence_type: str = opt("reverse_kl", "divergence between policy and reference", choices=F_DIVERGENCES)
    f_alpha_divergence_coef: float = opt(0.5, "α of the alpha divergence")
    ld_alpha: float | None = opt(None, "LD-DPO: weight of the tokens beyond the shorter answer's length")
    discopop_tau: float = opt(0.05, "temperature of the discopop loss")
    use_weighting: bool = opt(False, "WPO: weight pairs by the policy's own probability of them")
    disable_dropout: bool = opt(True, "set every dropout of policy and reference to zero")
    reference_model: str | None = opt(None, "reference model folder or Hub name; unset: the policy before training")

    def __post_init__(self) -> None:
        problems = []
        if self.beta <= 0:
            problems.append(f"--beta must be above 0, not {self.beta}")
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            problems.append(f"--loss_weights has {len(self.loss_weights)} values for {len(self.loss_type)} --loss_type")
        if not 0 <= self.label_smoothing < 0.5:
            problems.append(f"--label_smoothing must be at least 0 and below 0.5, not {self.label_smoothing}")
        if self.label_smoothing and not set(self.loss_type) & set(SMOOTHED_LOSSES):
            problems.append(
                f"--label_smoothing has no effect with --loss_type {' '.join(self.loss_type)}; "
                f"it has with {', '.join(SMOOTHED_LOSSES)}"
            )
        if "exo_pair" in self.loss_type and not self.label_smoothing:
            problems.append("--loss_type exo_pair needs --label_smoothing above 0 (its paper takes 1e-3)")
        if self.f_divergence_type != "reverse_kl" and not set(self.loss_type) <= set(F_DIVERGENCE_LOSSES):
            problems.append(
                f"--f_divergence_type {self.f_divergence_type} goes with {', '.join(F_DIVERGENCE_LOSSES)}, "
                f"not with --loss_type {' '.join(self.loss_type)}"
            )
        alpha_given = self.f_alpha_divergence_coef != type(self).f_alpha_divergence_coef
        if alpha_given and self.f_divergence_type != "alpha_divergence":
            problems.append("--f_alpha_divergence_coef has no effect without --f_divergence_type alpha_divergence")
        if self.discopop_tau <= 0:
            problems.append(f"--discopop_tau must be above 0, not {self.discopop_tau}")
        if self.discopop_tau != type(self).discopop_tau and "discopop" not in self.loss_type:
            problems.append("--discopop_tau has no effect without --loss_type discopop")
        if self.use_weighting and {"aot", "aot_unpaired"} & set(self.loss_type):
            problems.append("--use_weighting cannot weight the losses aot and aot_unpaired: they sort the pairs apart")
        if self.ld_alpha is not None and not 0 <= self.ld_alpha <= 1:
            problems.append(f"--ld_alpha must be between 0 and 1, not {self.ld_alpha}")
        inert = [name for name in ("beta", "f_divergence_type", "ld_alpha", "reference_model") if name in changed(self)]
        if inert and set(self.loss_type) == {"sft"}:
            problems.append(f"{flags(inert)} no effect with --loss_type sft, which has no reference")
        refuse(problems)

    @property
    def trl_losses(self) -> tuple[list[str], list[float]]:
        """TRL's loss terms and weights that add up to the losses asked for.

        TRL's sigmoid ignores label smoothing. With x = β·margin, its robust loss (Chowdhury et al. 2024, Eq. 11) is
        −log σ(x) − εx / (1 − 2ε), and cDPO (Mitchell 2023) is −log σ(x) + εx. So cDPO is, exactly,
        (2 − 2ε)·sigmoid − (1 − 2ε)·robust, and TRL keeps the losses.
        """
        weights = self.loss_weights or [1.0] * len(self.loss_type)
        smoothing = self.label_smoothing
        terms: list[tuple[str, float]] = []
        for name, weight in zip(self.loss_type, weights, strict=True):
            if name == "sigmoid" and smoothing:
                terms += [("sigmoid", weight * (2 - 2 * smoothing)), ("robust", -weight * (1 - 2 * smoothing))]
            else:
                terms.append((name, weight))
        return [name for name, _ in terms], [weight for _, weight in terms]
