"""Flags of `flax-pref app`; quick to import, for --help needs them."""

import dataclasses

from flax_pref.config import UserError
from flax_pref.diffusion.drawing_flags import DrawingFlags, PromptSyntax


@dataclasses.dataclass(frozen=True, kw_only=True)
class AppFlags(DrawingFlags):
    """Serves a page that draws: base and guided image side by side, from the same noise.

    Rule, w, guidance scale and steps are what the page begins with. It offers the rules that the modules allow.
    """

    prompt_syntax: PromptSyntax = "plain"
    """Reading of prompts. plain: as they are, and cut behind 75 tokens; a1111, comfyui: as these programs read them,
    with weights such as (word:1.3), in a1111 also [word], and prompts of any length in chunks of 75 tokens."""
    mesh: str = "data=-1"
    """Device mesh. data=-1 divides the images over all devices; network=3,data=-1 also puts base and modules with full
    weights on different devices."""

    host: str = "127.0.0.1"
    """Address to listen on. 127.0.0.1: this machine only; 0.0.0.0: everyone who reaches this machine, without a
    password."""
    port: int = 7860
    """Port to listen on."""
    share: bool = False
    """Ask Gradio's servers for a public address, which anyone with the link can use for a week."""

    def __post_init__(self):
        super().__post_init__()
        if self.merge:
            raise UserError("--merge: weights hold one w, and the page changes it; leave it out")
        if self.preset == "fast":
            raise UserError(
                "--preset fast: merges one w into the weights, and the page changes it; expected full, light or late"
            )
        if self.preset == "late" and self.w is None:
            raise UserError("--preset late: needs --w, the strength of the modules in the second half, e.g. --w 4")
        if not 1 <= self.port <= 65535:
            raise UserError(f"--port {self.port}: expected 1 to 65535")
