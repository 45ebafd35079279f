"""A conversation that tests of chat templates and of chat prompts share."""

from eabf_jax.data.chat import Turn

TALK = [Turn("user", "Hello there"), Turn("assistant", "Hi! How are you?"), Turn("user", "  Fine, <s> thanks.")]
SYSTEM = Turn("system", "Be brief.")
