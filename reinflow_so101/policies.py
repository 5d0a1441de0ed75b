"""Policy families: what each is called, where its embedded policy lies, how it is loaded to learn or to act."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from reinflow import ConfigError
from reinflow.settings import cut
from reinflow_so101.door import LEROBOTS_STEPS, DoorSettings, adapted, enter
from reinflow_vla.directory import CONFIG_FILE, locate_policy, read_json
from so101_mujoco_utils import ENVIRONMENT_STATE_NAMES, model_dir
from so101_sim.config import EnvConfig

if TYPE_CHECKING:  # heavy imports stay inside the functions: --help must be fast
    from reinflow.policy import FlowPolicy
    from reinflow_vla.base import ReinFlowVLA


@dataclass(frozen=True)
class PolicySettings:
    """Which policy to fine-tune and what of it learns; TrainingConfig says why under each field."""

    model_type: str
    policy_path: str
    chunk_size: int
    n_action_steps: int
    num_denoising_steps: int
    sigma_min: float
    sigma_max: float
    train_action_head: bool
    train_time_mlp: bool
    train_full_expert: bool
    train_noise_head: bool
    train_critic: bool
    critic_input: str
    critic_hidden_size: int
    seed: int
    prefix_cache: Literal["auto", "heads", "kv", "embeddings", "none"]
    prefix_cache_gb: float
    compile_expert: bool
    pi0_tokenizer_path: str
    pi0_vlm_dtype: str
    pi0_gradient_checkpointing: bool
    peft_rank: int
    rename_map: str = ""
    normalization: str = "auto"
    joint_frame: str = "auto"
    calibration: str = ""


@dataclass(frozen=True)
class ActingSettings:
    """How a finished policy acts; 0 and "" take what is stored with it."""

    device: str = "cpu"
    num_denoising_steps: int = 0
    n_action_steps: int = 0
    tokenizer: str = ""
    door: DoorSettings = field(default_factory=DoorSettings)
    cameras: tuple[str, ...] = ()  # of the environment; without them the policy is taken as it is
    frame: str = "lerobot"  # the environment's joint units


@dataclass(frozen=True)
class Family:
    """One kind of policy."""

    types: tuple[str, ...]  # `type` in the config.json of its directories
    folder: str  # of the embedded policy, beside the scene
    embedded_name: str  # what a training's path says for that
    adapter: Callable[[], type[FlowPolicy]]
    build: Callable[[PolicySettings, Path, EnvConfig, int, str], FlowPolicy]  # to learn
    load: Callable[[Path, ActingSettings], FlowPolicy]  # to act without noise
    locate: Callable[[str], Path] = locate_policy
    others: Mapping[str, str] = field(default_factory=dict)  # further embedded ones: name -> folder

    def directory(self, path: str) -> Path:
        """The policy directory that a path names; raises PolicyDirectoryError where there is none."""
        return self.embedded_directory(path) or self.locate(path)

    def embedded_directory(self, name: str) -> Path | None:
        """The directory of an embedded policy; None if there is none of that name."""
        folder = {self.embedded_name: self.folder, **self.others}.get(name)
        return model_dir() / folder if folder else None

    @property
    def embedded(self) -> Path:
        """Directory of the embedded policy."""
        return model_dir() / self.folder


def family_of(policy_dir: Path) -> Family | None:
    """The family of a policy directory; None for LeRobot's other policies."""
    kind = read_json(policy_dir / CONFIG_FILE).get("type")
    return next((family for family in FAMILIES.values() if kind in family.types), None)


def build_policy(settings: PolicySettings, env: EnvConfig, decisions: int, device: str) -> FlowPolicy:
    """Load the policy to fine-tune.

    Args:
        settings: which one, and what of it learns.
        env: the environment that it will act in.
        decisions: of a rollout, which the prefix cache must hold.
        device: where it runs.

    Raises:
        ConfigError: the policy does not fit the settings.
    """
    import torch

    torch.manual_seed(settings.seed)  # initial weights of noise head and critic
    family = FAMILIES[settings.model_type]
    policy = family.build(settings, family.directory(settings.policy_path), env, decisions, device)
    if policy.chunk_size != settings.chunk_size:
        raise ConfigError(
            f"chunk_size={settings.chunk_size}, but {settings.policy_path} predicts {policy.chunk_size}: set chunk_size"
        )
    return policy


# --- Vision-language-action policies ----------------------------------------------------------------------------------


def _smolvla() -> type[ReinFlowVLA]:
    from reinflow_smolvla import ReinFlowSmolVLA

    return ReinFlowSmolVLA


def _pi0() -> type[ReinFlowVLA]:
    from pi0_adapter import ReinFlowPi0

    return ReinFlowPi0


def vla_settings(settings: PolicySettings) -> dict[str, Any]:
    """What ReinFlowVLA's constructor takes."""
    from reinflow_vla.base import TrainableGroups

    return {
        "num_denoising_steps": settings.num_denoising_steps,
        "n_action_steps": settings.n_action_steps,
        "sigma_min": settings.sigma_min,
        "sigma_max": settings.sigma_max,
        "groups": cut(settings, TrainableGroups),
        "critic_hidden_size": settings.critic_hidden_size,
        "critic_state_dim": len(ENVIRONMENT_STATE_NAMES) if settings.critic_input == "state" else 0,
    }


def pi0_options(settings: PolicySettings) -> dict[str, Any]:
    """What ReinFlowPi0's constructor takes beside ``vla_settings``."""
    return {"gradient_checkpointing": settings.pi0_gradient_checkpointing, "peft_rank": settings.peft_rank}


def _build_smolvla(settings: PolicySettings, path: Path, env: EnvConfig, decisions: int, device: str) -> FlowPolicy:
    return _build_vla(_smolvla, {}, settings, path, env, decisions, device)


def _build_pi0(settings: PolicySettings, path: Path, env: EnvConfig, decisions: int, device: str) -> FlowPolicy:
    options = pi0_options(settings) | {"dtype": settings.pi0_vlm_dtype, "tokenizer": settings.pi0_tokenizer_path}
    return _build_vla(_pi0, options, settings, path, env, decisions, device)


def _build_vla(
    adapter: Callable[[], type[ReinFlowVLA]],
    options: dict[str, Any],
    settings: PolicySettings,
    path: Path,
    env: EnvConfig,
    decisions: int,
    device: str,
) -> FlowPolicy:
    from so101_sim.vector.base import blank_observation

    if settings.compile_expert:
        _check_compiler(device)
    entrance = enter(path, cut(settings, DoorSettings), env.cameras, env.joint_frame)
    with adapted(entrance) as folder:
        policy = adapter().from_pretrained(folder, device, **vla_settings(settings), **options)
    if settings.compile_expert:
        policy.compile_expert()
    plan = policy.plan_prefix_cache(
        blank_observation(env), settings.prefix_cache, decisions, settings.prefix_cache_gb
    )  # fmt: skip
    print(plan.describe(decisions))
    return policy


def _check_compiler(device: str) -> None:
    """Compile something small now rather than the expert after the first rollout."""
    import torch

    try:
        torch.compile(torch.nn.functional.silu)(torch.zeros(8, device=device))
    except RuntimeError as error:  # what torch's compilers derive their errors from
        raise ConfigError(
            f"compile_expert: torch.compile does not work on {device}: {error}. It needs a C++ compiler and Python's "
            "headers (apt-get install g++ python3-dev), on cuda Triton; or drop compile_expert"
        ) from error


def _load_smolvla(path: Path, acting: ActingSettings) -> FlowPolicy:
    return _load_vla(_smolvla, {}, path, acting)


def _load_pi0(path: Path, acting: ActingSettings) -> FlowPolicy:
    return _load_vla(_pi0, {"tokenizer": acting.tokenizer} if acting.tokenizer else {}, path, acting)


def _load_vla(
    adapter: Callable[[], type[ReinFlowVLA]], options: dict[str, Any], path: Path, acting: ActingSettings
) -> FlowPolicy:
    family, stored = adapter(), read_json(path / CONFIG_FILE)
    with ExitStack() as stack:
        if acting.cameras:
            entrance = enter(path, acting.door, acting.cameras, acting.frame)
            path = stack.enter_context(adapted(entrance))
            for line in entrance.lines:
                print(line)
        return _load_to_act(family, path, stored, options, acting)


def _load_to_act(
    family: type[ReinFlowVLA], path: Path, stored: Mapping[str, Any], options: dict[str, Any], acting: ActingSettings
) -> FlowPolicy:
    from reinflow_vla.base import TrainableGroups

    return family.from_pretrained(
        path, acting.device,
        num_denoising_steps=acting.num_denoising_steps or stored.get(family.num_steps_field, LEROBOTS_STEPS),
        n_action_steps=acting.n_action_steps or stored.get("n_action_steps", 0),
        sigma_min=0.1, sigma_max=0.1, groups=TrainableGroups(False, False, False, False, False),
        critic_hidden_size=8, **options,
    )  # fmt: skip


# --- The state-based policy -------------------------------------------------------------------------------------------


def _flow_mlp() -> type[FlowPolicy]:
    from reinflow.flow_mlp import FlowMLP

    return FlowMLP


def _build_flow_mlp(settings: PolicySettings, path: Path, _env: EnvConfig, _decisions: int, device: str) -> FlowPolicy:
    from reinflow.flow_mlp import FlowMLP

    policy = FlowMLP.from_pretrained(
        path,
        device,
        num_denoising_steps=settings.num_denoising_steps,
        critic_hidden_size=settings.critic_hidden_size,
        sigma_min=settings.sigma_min,
        sigma_max=settings.sigma_max,
        n_action_steps=settings.n_action_steps,
    )
    wanted = {
        "trunk": settings.train_full_expert,  # holds the time embedding: train_time_mlp goes with it (checks.py)
        "head": settings.train_action_head,
        "noise_mlp": settings.train_noise_head,
        "critic": settings.train_critic,
    }
    policy.train_only([name for name, learns in wanted.items() if learns])
    return policy


def _load_flow_mlp(path: Path, acting: ActingSettings) -> FlowPolicy:
    from reinflow.flow_mlp import FlowMLP

    asked = {name: getattr(acting, name) for name in ("num_denoising_steps", "n_action_steps")}
    return FlowMLP.from_pretrained(path, acting.device, **{name: value for name, value in asked.items() if value})


FAMILIES: dict[str, Family] = {
    "smolvla": Family(
        ("smolvla",),
        "tiny_smolvla",
        "tiny",
        _smolvla,
        _build_smolvla,
        _load_smolvla,
        others={"tiny-base": "tiny_smolvla_base"},
    ),
    "pi0": Family(("pi0", "pi05"), "tiny_pi0", "tiny", _pi0, _build_pi0, _load_pi0),
    "flow_mlp": Family(("flow_mlp",), "flow_mlp", "embedded", _flow_mlp, _build_flow_mlp, _load_flow_mlp, Path),
}
EMBEDDED = {
    "tiny": FAMILIES["smolvla"],
    "tiny-base": replace(
        FAMILIES["smolvla"], folder=FAMILIES["smolvla"].others["tiny-base"], embedded_name="tiny-base"
    ),
    "tiny-pi0": FAMILIES["pi0"],
    "flow_mlp": FAMILIES["flow_mlp"],
}
"""What a command that takes any family calls the embedded policies."""
