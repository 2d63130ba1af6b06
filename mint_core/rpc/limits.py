"""Limits that both services enforce and that GetServerCapabilities announces."""

MAX_MESSAGE_BYTES = 256 * 1024 * 1024  # in either direction
LARGE_BYTES = 64 * 1024  # parsing more than this on the event loop would hold up other calls
MAX_TEXT_BYTES = 1024  # of an id, a name, a path, a stop text
MAX_DATA_PER_REQUEST = 1024
MAX_CHUNKS_PER_INPUT = 8192
MAX_TOKENS_PER_CHUNK = 2**20
MAX_TENSOR_DIMENSIONS = 2
MAX_TYPED_VALUES = 2**20  # of one tensor, as numbers and not as bytes
MAX_LOSS_FN_INPUTS = 16
MAX_TARGET_MODULES = 4096
MAX_CALLS_IN_FLIGHT_PER_RUN = 64
MAX_SAMPLES_PER_REQUEST = 1024
MAX_TOPK_LOGPROBS = 64
MAX_TARGETS = 1024  # tokens that are scored in place of one
MAX_STOP_TEXTS = 256
MAX_STOP_BYTES = 16 * 1024
MAX_STOP_TOKEN_IDS = 16_384
MAX_CONSTRAINT_BYTES = 64 * 1024
MAX_REQUEST_ID_CHARACTERS = 128
MAX_METADATA_ENTRIES = 64
MAX_METADATA_BYTES = 16 * 1024
MAX_UPLOADED_FILES = 16
MAX_SCOPES = 16
MAX_TEXTS = 1024  # or conversations, or sequences of tokens, of one request
MAX_TEXT_REQUEST_BYTES = 4 * 2**20
MAX_TOOLS_BYTES = 2**20
