"""Train and serve LLaVA-style models with fewer visual tokens."""

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name == "LlavaLlamaForCausalLM":  # LLaVA's package has it here
        from llava.model import LlavaLlamaForCausalLM

        return LlavaLlamaForCausalLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
