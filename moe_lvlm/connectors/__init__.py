"""What stands between the vision tower and the language model: Q-MoE, a Q-Former with task experts."""

from moe_lvlm.connectors.importance import importance_loss
from moe_lvlm.connectors.qmoe import QMoEModel
from moe_lvlm.connectors.upcycle import upcycle_qformer

__all__ = ["QMoEModel", "importance_loss", "upcycle_qformer"]
