"""Adversarial inputs: `attack` for a batch, `Adversary` for a training loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn

from advtrain.api.checks import (
    build_teacher,
    check_model,
    check_samples,
    parse_any_threat,
    parse_threat,
    unwrap,
    validate,
)
from advtrain.api.edits import check_data_root, edited_texts, refuse_settings
from advtrain.api.texts import Texts, require_embeddings, to_tensor
from advtrain.attacks import (
    ATTACKS,
    AttackConfig,
    BatchNormMode,
    build_attack,
    build_suite,
    check_suite,
    logits_of,
    predictions,
)
from advtrain.errors import UserError
from advtrain.models.network import attack_view, embeds
from advtrain.recipe.edits import EditThreatConfig
from advtrain.seeding import mix_seed
from advtrain.threat import ThreatModel


class Adversary:
    """Attack for a training loop: `x_adv = adversary(model, x, y)`.

    The random starts of each call depend on the seed, the number of the call and the rank. The model's gradients, modes
    and batch-norm statistics, and the global random generators, are not changed.

    Args:
        threat: a ThreatModel, or text such as "linf:8/255".
        name: pgd, fgsm, fgsm_rs, n_fgsm, mi_fgsm, vat or noise.
        batch_norm: mode of the batch-norm layers during the attack, "eval" or "train".
        seed: seed of all random starts.
        teacher: module that maps x to logits (N, K), for loss="kl_teacher". Its weights must not change, because its
            outputs for the last batch are reused.
        **settings: settings of a recipe's `adversary`: num_steps (10 for pgd), step_size, start, loss, num_restarts,
            ...

    Raises:
        UserError: unknown name or setting, or incompatible settings.
    """

    def __init__(
        self,
        threat: ThreatModel | str,
        name: str = "pgd",
        *,
        batch_norm: BatchNormMode = "eval",
        seed: int = 0,
        teacher: nn.Module | None = None,
        **settings: Any,
    ) -> None:
        self.threat, self.seed, self.num_calls = parse_threat(threat), seed, 0
        self.config = validate(AttackConfig, {"name": name, **settings})
        if self.config.climbs_objective:
            raise UserError(
                f"{self.config.name} perturbs inputs in the training step itself; use `advtrain train`"
            )
        if teacher is not None and self.config.loss != "kl_teacher":
            raise UserError('teacher has no effect without loss="kl_teacher"')
        self._attack = build_attack(self.config, batch_norm, teacher=build_teacher(teacher))

    def __call__(
        self,
        model: nn.Module,
        x: Tensor | Texts,
        y: Tensor,
        *,
        eps_scale: float = 1.0,
        step: int | None = None,
    ) -> Tensor:
        """Return detached adversarial inputs (N, ...) like x; for an EmbeddingModel, like embed(x).

        Args:
            model: maps x to logits (N, K), in training or evaluation mode; DistributedDataParallel is unwrapped.
            x: (N, ...) float32 within the threat model's bounds; inputs of any type for an EmbeddingModel; texts for a
                text model.
            y: (N,) int64 labels, or float targets of a regression.
            eps_scale: factor for the radius and the step size, in [0, 1]; for a warm-up.
            step: number of the call, for a loop that resumes; None: one more than in the previous call.

        Raises:
            UserError: inputs outside the bounds, invalid labels, or outputs that are not logits (N, K).
        """
        require_embeddings(unwrap(model))
        x = to_tensor(unwrap(model), x)
        number = self.num_calls if step is None else step
        self.num_calls = number + 1
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        generator = torch.Generator(x.device).manual_seed(mix_seed("attack", self.seed, number, rank))
        if self.config.loss == "kl_teacher" and embeds(unwrap(model)):
            raise UserError("the loss kl_teacher runs the teacher on inputs; this model perturbs embed(x)")
        model, z, threat = attack_view(unwrap(model), x.detach(), self.threat.scaled(eps_scale))
        return self._attack.scaled(eps_scale)(model, z, y, threat, generator)


@overload
def attack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel | str,
    name: str | None = None,
    **settings: Any,
) -> Tensor: ...


@overload
def attack(
    model: nn.Module,
    x: Texts,
    y: Tensor,
    threat: ThreatModel | EditThreatConfig | str,
    name: str | None = None,
    **settings: Any,
) -> Any: ...


def attack(
    model: nn.Module,
    x: Tensor | Texts,
    y: Tensor,
    threat: ThreatModel | EditThreatConfig | str,
    name: str | None = None,
    *,
    seed: int = 0,
    batch_size: int | None = None,
    data_root: str | Path | None = None,
    **settings: Any,
) -> Tensor | list[str]:
    """Return adversarial inputs for a model, without changing the model.

    Args:
        model: maps x to logits (N, K); any module on any device. It is attacked in evaluation mode, so batch norm in
            training mode is refused. `wrap_model` adapts a model of normalized inputs or with other outputs.
        x: (N, ...) float32 within the threat model's bounds, by default [0, 1]. For an EmbeddingModel
            (`advtrain.models.network`), inputs of any type; the attack perturbs embed(x). For a text model from
            `load_model`, a list of texts, or their token ids.
        y: (N,) int64 labels.
        threat: a ThreatModel, or text such as "linf:8/255" or "l2:0.5". For a list of texts also edits, such as
            "words:2" or "chars:1,where=anywhere,budget=500", or `evaluation.threat` of a recipe.
        name: pgd (the default), fgsm, fgsm_rs, mi_fgsm, vat; or a suite (quick, standard, autoattack, rand), or a
            comma-separated list such as "apgd-ce,square-1000". Edits have no name.
        seed: seed of all random starts and searches. The global generators are neither used nor changed.
        batch_size: samples per forward pass; None: all. Edits have no batch size.
        data_root: folder of the data, for the table of edits of words; None: $ADVTRAIN_DATA_ROOT or ./data.
        **settings: settings of a gradient attack: num_steps (20 for pgd), step_size, num_restarts, loss, start.

    Returns:
        x_adv (N, ...) like x, or like embed(x), inside the threat model. A suite returns the input that fooled the
        model. It returns the clean input if it found none, or if the clean input is already misclassified. Edits
        likewise return a list of N texts; a registered model can be attacked, too.

    Raises:
        UserError: unknown name or setting, inputs outside the bounds, invalid labels, outputs that are not logits, a
            model with batch norm in training mode, edits of anything but texts, or a missing table.
    """
    threat = parse_any_threat(threat)
    check_data_root(data_root, threat)
    if isinstance(threat, EditThreatConfig):
        refuse_settings({"name": name, "batch_size": batch_size} | settings, threat)
        return edited_texts(unwrap(model), x, y, threat, seed, data_root)
    tensor, name = to_tensor(unwrap(model), x), "pgd" if name is None else name
    return _attack_tensors(unwrap(model), tensor, y, threat, name, seed, batch_size, settings)


def _attack_tensors(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    name: str,
    seed: int,
    batch_size: int | None,
    settings: dict[str, Any],
) -> Tensor:
    """Return adversarial inputs of an attack or a suite within a ball."""
    check_samples(model, x, y, threat)
    x = x.detach()
    if len(x) == 0:
        return x.clone()
    check_model(model, x, y)
    if name in ATTACKS and ATTACKS[name].training_only and name != "edits":  # Adversary refuses edits
        raise UserError(f"{name} is for training only, not for evaluation; use Adversary or pgd")
    if name in ATTACKS:
        defaults = {"num_steps": 20} if name == "pgd" else {}
        found, size = [], batch_size or len(x)
        for number, first in enumerate(range(0, len(x), size)):
            part = slice(first, first + size)
            adversary = Adversary(threat.rows(part), name, seed=seed, **defaults | settings)
            found.append(adversary(model, x[part], y[part], step=number))
        return torch.cat(found)
    if settings:
        raise UserError(
            f"{next(iter(settings))} belongs to a gradient attack ({', '.join(ATTACKS)}), not to '{name}'"
        )
    return _attack_with_suite(model, x, y, threat, name, seed, batch_size)


def _attack_with_suite(
    model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, name: str, seed: int, batch_size: int | None
) -> Tensor:
    suite = build_suite(name, threat.norm)
    model, x, threat = attack_view(model, x, threat)
    check_suite(suite, threat)
    x_adv = x.clone()
    robust = predictions(logits_of(model, x, batch_size)) == y
    for number, search in enumerate(suite):
        for round_ in range(search.num_rounds):
            rows = robust.nonzero().flatten()
            if len(rows) == 0:
                return x_adv
            generator = torch.Generator(x.device).manual_seed(mix_seed("attack", seed, number, round_))
            found, fooled = search.find_failures(
                model, x[rows], y[rows], threat.rows(rows), generator, round_, batch_size
            )
            x_adv[rows[fooled]] = found[fooled]
            robust[rows[fooled]] = False
    return x_adv
