"""Options of the DPO objective: the table of losses, and which options go with which loss."""

import dataclasses
import difflib
import functools
from collections.abc import Callable, Collection, Iterator
from typing import Any

from tandem.errors import UserError
from tandem.objects import load_object
from tandem.options.fields import changed, flags, opt
from tandem.options.rules import Options

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


@dataclasses.dataclass(frozen=True)
class Loss:
    """One loss of DPO, and what goes with it. A user's own loss is one of these, or a mere function (`per_pair`).

    Attributes:
        name: what `--loss_type` calls it.
        source: where its formula is from.
        smoothed: whether `--label_smoothing` changes it.
        f_divergence: whether it goes with divergences other than reverse KL: so do losses in which β·log Z(x) cancels.
        reference: `loss` if its formula has the reference's log-probs, else `none`.
        weighted: whether `--use_weighting` can weight it: it has a value for each pair, which TRL 1.16 can multiply.
        margin: whether it takes a margin for each pair, by which β times the log-ratios must differ (ODPO, Amini et al.
            2024).
        coupled: whether its value for a pair may depend on other pairs of the micro-batch; a user's function may.
        on_gaudi: whether it can be used on Gaudi: its formula is the same in TRL 1.16 and in TRL 0.9.6, which
            optimum-habana needs, or Tandem computes it.
        per_pair: (`tandem.engine.losses.Pairs`) → (B,), each pair's loss; or the text `module:function` that names it.
            None: TRL computes it.
        rewards: (`tandem.engine.losses.Pairs`) → the implicit rewards of chosen and of rejected answers that are
            logged, (B,) each; or the text that names it. None: β times the log-ratio to the reference; where the loss
            has none, β times the log-prob.
    """

    name: str
    source: str = ""
    smoothed: bool = False
    f_divergence: bool = False
    reference: str = "loss"
    weighted: bool = True
    margin: bool = False
    coupled: bool = False
    on_gaudi: bool = False
    per_pair: Callable[[Any], Any] | str | None = None
    rewards: Callable[[Any], Any] | str | None = None


_OWN = "tandem.engine.losses"
LOSSES = {
    loss.name: loss
    for loss in (
        Loss("sigmoid", "Rafailov et al. 2023, Eq. 7", margin=True, smoothed=True, f_divergence=True, on_gaudi=True),
        # Not weighted, like aot: TRL multiplies by WPO's weights in place, which autograd forbids after relu and expand
        Loss("hinge", "Zhao et al. 2023 (SLiC)", margin=True, f_divergence=True, weighted=False, on_gaudi=True),
        Loss("ipo", "Azar et al. 2023, Eq. 17, in means over tokens", f_divergence=True, on_gaudi=True),
        Loss("exo_pair", "Ji et al. 2024, Eq. 16", margin=True, smoothed=True, f_divergence=True, on_gaudi=True),
        Loss("nca_pair", "Chen et al. 2024", on_gaudi=True),
        Loss("robust", "Chowdhury et al. 2024, Eq. 11", margin=True, smoothed=True, f_divergence=True, on_gaudi=True),
        Loss("bco_pair", "Jung et al. 2024"),
        Loss("sppo_hard", "Wu et al. 2024, Eq. 4.7", on_gaudi=True),
        Loss("aot", "Melnyk et al. 2024", smoothed=True, weighted=False, coupled=True),
        Loss("aot_unpaired", "Melnyk et al. 2024", smoothed=True, weighted=False, coupled=True),
        Loss("apo_zero", "D'Oosterlinck et al. 2024, Eq. 7"),
        Loss("apo_down", "D'Oosterlinck et al. 2024, Eq. 8"),
        Loss("discopop", "Lu et al. 2024, Eq. 5", margin=True, f_divergence=True),
        # A mean over the tokens of a micro-batch
        Loss("sft", "log-likelihood of chosen", f_divergence=True, reference="none", weighted=False, coupled=True),
        Loss("sigmoid_norm", "Rafailov et al. 2023, in means over tokens", f_divergence=True),
        Loss(
            "simpo", "Meng et al. 2024, Eq. 6", margin=True, smoothed=True, reference="none", on_gaudi=True,
            per_pair=f"{_OWN}:simpo", rewards=f"{_OWN}:mean_rewards",
        ),
        Loss(
            "cpo", "Xu et al. 2024, Eq. 3", margin=True, smoothed=True, reference="none", on_gaudi=True,
            per_pair=f"{_OWN}:cpo",
        ),
    )
}  # fmt: skip


@functools.cache  # asked for at every micro-batch; and a user's file should be executed only once
def loss_named(name: str) -> Loss:
    """The loss that `--loss_type` calls `name`: of the table, or a user's `module:function` or `file.py:function`.

    Raises:
        UserError: there is no such loss, module or function.
    """
    if name in LOSSES:
        return LOSSES[name]
    if ":" not in name:
        near = difflib.get_close_matches(name, LOSSES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(LOSSES)}"
        raise UserError(f"--loss_type {name}: no such loss ({hint}); a loss of your own is named module:function")
    found = load_object(name, "--loss_type")
    if isinstance(found, Loss):
        if found.per_pair is None:
            raise UserError(f"--loss_type {name}: this Loss has no per_pair function")
        return dataclasses.replace(found, name=name, on_gaudi=True)
    if not callable(found):
        raise UserError(f"--loss_type {name}: is a {type(found).__name__}, neither a function nor a Loss")
    return Loss(name, per_pair=found, on_gaudi=True, coupled=True)


@dataclasses.dataclass
class DPOOptions(Options):
    """DPO."""

    beta: float = opt(0.1, "β: how strongly the policy is held to the reference", above=0, trl=True)
    loss_type: list[str] = opt(
        ["sigmoid"], f"one loss, or several to be added: {', '.join(LOSSES)}; or your own, as module:function"
    )
    loss_weights: list[float] | None = opt(None, "weights of several losses")
    label_smoothing: float = opt(
        0.0, "share of labels taken for flipped; with sigmoid this is cDPO", low=0, below=0.5, trl=True
    )
    f_divergence_type: str = opt(
        "reverse_kl", "divergence between policy and reference", choices=F_DIVERGENCES, trl=True
    )
    f_alpha_divergence_coef: float = opt(
        0.5, "α of the alpha divergence", needs="f_divergence_type=alpha_divergence", trl=True
    )
    ld_alpha: float | None = opt(
        None, "LD-DPO: weight of the tokens beyond the shorter answer's length", low=0, high=1, trl=True
    )
    discopop_tau: float = opt(0.05, "temperature of the discopop loss", above=0, needs="loss_type=discopop", trl=True)
    use_weighting: bool = opt(False, "WPO: weight pairs by the policy's own probability of them", trl=True)
    simpo_gamma: float = opt(
        0.5, "SimPO: γ, the margin that β times the means' difference should reach", low=0, needs="loss_type=simpo"
    )
    sync_ref_model: bool = opt(False, "TR-DPO: move the reference towards the policy as it trains")
    ref_model_mixup_alpha: float = opt(
        0.6, "TR-DPO: α, the policy's share in the reference after a sync", above=0, high=1, needs="sync_ref_model"
    )
    ref_model_sync_steps: int = opt(
        512, "TR-DPO: optimizer steps from one sync to the next", low=1, needs="sync_ref_model"
    )
    disable_dropout: bool = opt(True, "set every dropout of policy and reference to zero", trl=True)
    reference_model: str | None = opt(None, "reference model folder or Hub name; unset: the policy before training")

    def conflicts(self) -> Iterator[str]:
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            yield f"--loss_weights has {len(self.loss_weights)} values for {len(self.loss_type)} --loss_type"
        losses, unknown = [], []
        for name in self.loss_type:
            try:
                losses.append(loss_named(name))
            except UserError as problem:
                unknown.append(str(problem))
        yield from unknown or self._conflicts_of(losses)

    def _conflicts_of(self, losses: list[Loss]) -> Iterator[str]:
        """Which options do not go with these losses, or have no effect with them."""
        named = f"--loss_type {' '.join(self.loss_type)}"
        if self.label_smoothing and not any(loss.smoothed for loss in losses):
            smoothed = ", ".join(loss.name for loss in LOSSES.values() if loss.smoothed)
            yield f"--label_smoothing has no effect with {named}; it has with {smoothed}"
        if "exo_pair" in self.loss_type and not self.label_smoothing:
            yield "--loss_type exo_pair needs --label_smoothing above 0 (its paper takes 1e-3)"
        if self.f_divergence_type != "reverse_kl" and not all(loss.f_divergence for loss in losses):
            fitting = ", ".join(loss.name for loss in LOSSES.values() if loss.f_divergence)
            yield f"--f_divergence_type {self.f_divergence_type} goes with {fitting}, not with {named}"
        if self.use_weighting and (unweighted := [each.name for each in losses if not each.weighted or each.per_pair]):
            plural = "losses" if len(unweighted) > 1 else "loss"
            yield f"--use_weighting cannot weight the {plural} {' and '.join(unweighted)}"
        inert = [name for name in ("beta", "f_divergence_type", "ld_alpha", "reference_model") if name in changed(self)]
        if inert and set(self.loss_type) == {"sft"}:
            yield f"{flags(inert)} no effect with --loss_type sft, which has no reference"
        if self.sync_ref_model and not self.needs_reference:
            yield f"--sync_ref_model has no effect with {named}, which has no reference"
        if self.sync_ref_model and self.reference_model:
            yield "--sync_ref_model begins with the policy before training: leave --reference_model out"
        elif self.reference_model and not self.needs_reference:
            yield f"--reference_model has no effect with {named}, which has no reference"

    def check_columns(self, columns: Collection[str]) -> None:
        """Refuse a column of margins or weights that one of the losses cannot use.

        Raises:
            UserError: naming column and loss.
        """
        losses = [loss for loss, _ in self.losses]
        if "margin" in columns:
            without = [loss.name for loss in losses if not loss.margin and (loss.name != "sft" or len(losses) == 1)]
            if without:
                fitting = ", ".join(loss.name for loss in LOSSES.values() if loss.margin)
                raise UserError(
                    f"the data's column 'margin' goes with {fitting} and a Loss of your own that has margin=True, not "
                    f"with --loss_type {' '.join(without)}; leave it out with --ignore_columns margin"
                )
            if self.f_divergence_type != "reverse_kl":
                raise UserError(
                    f"the data's column 'margin' does not go with --f_divergence_type {self.f_divergence_type}; leave "
                    "it out with --ignore_columns margin"
                )
        if "weight" in columns and (coupled := [each.name for each in losses if each.name in ("aot", "aot_unpaired")]):
            raise UserError(
                f"the data's column 'weight' does not go with --loss_type {' '.join(coupled)}, which compares pairs "
                "with each other; leave it out with --ignore_columns weight"
            )

    @property
    def losses(self) -> list[tuple[Loss, float]]:
        """The losses asked for, each with its weight."""
        weights = self.loss_weights or [1.0] * len(self.loss_type)
        return [(loss_named(name), weight) for name, weight in zip(self.loss_type, weights, strict=True)]

    @property
    def needs_reference(self) -> bool:
        """Whether a loss has the reference's log-probs in its formula, so that they must be computed. Without one, the
        logged rewards are β times the policy's log-probs, or those that the loss defines."""
        return any(loss.reference == "loss" for loss, _ in self.losses)

    @property
    def own_losses(self) -> list[tuple[Loss, float]]:
        """The losses that TRL does not compute, each with its weight."""
        return [(loss, weight) for loss, weight in self.losses if loss.per_pair is not None]

    @property
    def trl_losses(self) -> tuple[list[str], list[float]]:
        """TRL's losses, and weights with which their sum is what the options ask for.

        TRL's sigmoid ignores label smoothing. With x = β·margin, its robust loss (Chowdhury et al. 2024, Eq. 11) is
        −log σ(x) − εx / (1 − 2ε), and cDPO (Mitchell 2023) is −log σ(x) + εx. So cDPO is, exactly,
        (2 − 2ε)·sigmoid − (1 − 2ε)·robust, which TRL can compute.
        """
        smoothing = self.label_smoothing
        terms: list[tuple[str, float]] = []
        for loss, weight in self.losses:
            if loss.per_pair is not None:
                continue
            if loss.name == "sigmoid" and smoothing:
                terms += [("sigmoid", weight * (2 - 2 * smoothing)), ("robust", -weight * (1 - 2 * smoothing))]
            else:
                terms.append((loss.name, weight))
        return [name for name, _ in terms], [weight for _, weight in terms]
