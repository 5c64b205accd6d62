"""Markers shared by prompts, data and models; LLaVA's names and values, so its data and checkpoints fit."""

IGNORE_INDEX = -100
"""Label of a position that no loss is taken at."""

IMAGE_TOKEN_INDEX = -200
"""Stands in `input_ids` where an image goes; the model puts the image's tokens in its place."""

VIDEO_TOKEN_INDEX = -201
"""The same for a clip, all of whose frames take its place."""

DEFAULT_IMAGE_TOKEN = "<image>"
DEFAULT_VIDEO_TOKEN = "<video>"
DEFAULT_IMAGE_PATCH_TOKEN = "<im_patch>"
DEFAULT_IM_START_TOKEN = "<im_start>"
DEFAULT_IM_END_TOKEN = "<im_end>"

IMAGE_PLACEHOLDER = "<image-placeholder>"
"""What a user may write in a question where an image goes; replaced by `DEFAULT_IMAGE_TOKEN`."""

SHORT_ANSWER = "Answer the question using a single word or phrase."
"""The line after a question by which LLaVA asks for a short answer."""
