"""Which nanochat a checkpoint is from. No version is written into it: its tensors tell, then its meta file's keys."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nanochat_hf.recipes import ARCHITECTURES, RECIPES

from .names import Weights

# with gates of 32 channels nothing but the soft-cap differs, and no tensor shows that
ALIKE = ("feb2026", "mar2026-cap20")
CHOICES = tuple(dict.fromkeys((*ARCHITECTURES, *RECIPES)))
FINEWEB_SHARDS = 1822  # the last one's number; a loader that is further on reads ClimbMix
EVAL_TOKENS = {
    41943040: "mar2026-cap20",
    20971520: "feb2026",
}  # of base training, by default: since 4 March, and before


@dataclass(frozen=True)
class Origin:
    """The architecture of a checkpoint: a name in ARCHITECTURES, what says so, and which others fit as well."""

    name: str
    why: str
    others: tuple[str, ...] = ()

    def told(self) -> str:
        """One line for the user: what was found or assumed, and what else it could be."""
        cap = ARCHITECTURES[self.name]["final_logit_softcapping"]
        if not self.others:
            return f"architecture {self.name}, soft-cap {cap:g}: {self.why}"
        else_where = ", ".join(f"{n} (soft-cap {ARCHITECTURES[n]['final_logit_softcapping']:g})" for n in self.others)
        return (
            f"architecture {self.name}, soft-cap {cap:g}, is assumed: {self.why}; it could also be {else_where}. "
            "--probe TEXT compares the losses of both, --recipe NAME decides"
        )


def origin_of(weights: Weights, meta: Mapping[str, Any], recipe: str | None = None) -> Origin:
    """By tensors, then by the meta file; `recipe` decides where both leave a choice.

    Raises ValueError for tensors of no architecture known here, and for a recipe that they contradict.
    """
    fitting, why = _by_tensors(weights)
    if recipe is not None:
        if recipe not in CHOICES:
            raise ValueError(f"--recipe {recipe} is unknown; choose from {', '.join(CHOICES)}")
        name = "mar2026" if recipe == "head" else recipe  # both compute the same
        if name not in fitting:
            raise ValueError(f"--recipe {recipe} does not fit this checkpoint: {why}; it is {' or '.join(fitting)}")
        return Origin(name, f"{why}, and --recipe says so" if len(fitting) > 1 else why)
    return Origin(fitting[0], why) if len(fitting) == 1 else _by_meta(meta, why)


def _by_tensors(weights: Weights) -> tuple[tuple[str, ...], str]:
    # the architectures that fit, and why
    bigrams = sorted(name for name in weights if name.startswith("bigram_"))
    if bigrams:
        raise ValueError(
            f"the checkpoint has {bigrams[0]}: nanochat looked pairs of tokens up on 27 and 28 January 2026 only, and "
            "this architecture has no such tables; it cannot be imported"
        )
    widths = {tensor.shape[-1] for name, tensor in weights.items() if name.endswith(".ve_gate.weight")}
    if any(name.startswith(("smear_", "backout_")) for name in weights):
        return ("mar2026",), "it has smear and backout (since 14 March 2026)"
    if widths == {12}:
        return ("mar2026-gates",), "gates of 12 channels and no smear (9 to 14 March 2026)"
    if widths - {32}:
        raise ValueError(
            f"value gates of {', '.join(map(str, sorted(widths)))} channels are of no nanochat known here, "
            "which has 32 or 12; it cannot be imported"
        )
    if "resid_lambdas" not in weights:
        return ("feb2026",), "no residual scalars (before 11 January 2026)"
    if not any(name.startswith("value_embeds.") for name in weights):
        return ("feb2026",), "no value embeddings (11 to 18 January 2026)"
    return ALIKE, "gates of 32 channels (18 January to 9 March 2026)"


def _by_meta(meta: Mapping[str, Any], tensors: str) -> Origin:
    # between the two that tensors cannot tell apart
    user, loader = meta.get("user_config") or {}, meta.get("dataloader_state_dict") or {}
    base = "loop_state" in meta or "device_batch_size" in meta
    others = (ALIKE[1],)
    if base and (loader.get("pq_idx") or 0) >= FINEWEB_SHARDS:
        return Origin(ALIKE[1], f"{tensors}, reading ClimbMix (since 4 March)")
    if base and EVAL_TOKENS.get(user.get("eval_tokens")) == ALIKE[1]:
        return Origin(ALIKE[1], f"{tensors}, eval_tokens {user['eval_tokens']} (since 4 March)")
    if base and "total_batch_size" not in meta:
        return Origin(ALIKE[0], f"{tensors}, no total_batch_size in the meta file (before 16 February)")
    if not base and ("dry_run" in user or "dtype" in user):
        return Origin(ALIKE[0], f"{tensors}, fine-tuned with a flag that went on 16 February")
    if base and user.get("eval_tokens") in EVAL_TOKENS:
        return Origin(ALIKE[0], f"{tensors}, eval_tokens {user['eval_tokens']} (before 4 March)", others)
    return Origin(ALIKE[0], f"{tensors}, and the meta file does not tell", others)
