"""Nodes of the configuration that take any key, such as `method.config` with the fields of the installed peft.

Hydra refuses keys that no YAML names. A flag switches that off for one node, but YAML has no syntax for flags, so the
node is registered here and named in the defaults of conf/method/peft.yaml.
"""

from __future__ import annotations

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

OPEN = DictConfig({"config": DictConfig({}, flags={"struct": False})})


def register() -> None:
    """Register the open nodes; a repeated call changes nothing."""
    ConfigStore.instance().store(group="method/peft", name="_open", node=OPEN)
