"""How user states are stored in fewer bytes: float16, or int8 with a scale for each token.

Training and the encoder know nothing of it: a state is rounded once, when it is stored, and every head that is
measured or served reads the rounded state. float32 needs no codec (None): it stands as a list of numbers.

Legend: U users, m tokens of a state, W = m x D its width, B bytes of a stored state.
"""

from dataclasses import dataclass
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from model.config import TowerConfig

_LARGEST: Final = 127
_SCALE_BYTES: Final = 4

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class StateCodec:
    """Numbers to the bytes of one field and back.

    float16: W little-endian halves. int8: a little-endian float32 scale for each token, then W signed bytes; a number
    is its byte times its token's scale, which is the token's largest |number| / 127. A token of zeros has scale 0.
    """

    name: str
    """float16 or int8."""
    tokens: int = 1

    @classmethod
    def of(cls, config: TowerConfig) -> Self | None:
        """The codec of a tower's states; None where they are stored as they are."""
        return None if config.storage_codec == "float32" else cls(config.storage_codec, config.state_tokens)

    def encode(self, state_UW: Floats) -> Bytes:
        """f32 [U, W], W a multiple of the tokens, to u8 [U, B].

        A number that is not finite, or too large for float16, gives bytes that decode to numbers not all finite.
        """
        users, width = state_UW.shape
        if self.name == "float16":
            with np.errstate(over="ignore"):
                half_UW = np.ascontiguousarray(state_UW, "<f2")
            return half_UW.view(np.uint8).reshape(users, 2 * width)
        token_UmD = np.ascontiguousarray(state_UW, np.float32).reshape(users, self.tokens, width // self.tokens)
        scale_Um = _scales(token_UmD)
        with np.errstate(divide="ignore", invalid="ignore"):
            step_UmD = np.rint(token_UmD / scale_Um[..., None])
        step_UmD = np.nan_to_num(step_UmD.clip(-_LARGEST, _LARGEST), nan=0.0)
        scales = scale_Um.astype("<f4").view(np.uint8).reshape(users, _SCALE_BYTES * self.tokens)
        return np.concatenate([scales, step_UmD.astype(np.int8).view(np.uint8).reshape(users, width)], 1)

    def decode(self, data: bytes) -> Floats:
        """The bytes of one state to f32 [W]. Raises ValueError where no state has so many bytes."""
        state_W: Floats = self.decode_rows(np.frombuffer(data, np.uint8)[None])[0]
        return state_W

    def decode_rows(self, data_UB: Bytes) -> Floats:
        """u8 [U, B] to f32 [U, W]. Raises ValueError where no state has so many bytes."""
        users, size = data_UB.shape
        state_UW: Floats
        if self.name == "float16":
            if size % 2:
                raise ValueError(f"float16 takes 2 bytes a number, got {size} bytes")
            state_UW = np.ascontiguousarray(data_UB).view("<f2").astype(np.float32)
            return state_UW
        width = size - _SCALE_BYTES * self.tokens
        if width < 0 or width % self.tokens:
            raise ValueError(f"int8 of {self.tokens} tokens takes {_SCALE_BYTES} + D bytes a token, got {size} bytes")
        scale_Um = np.ascontiguousarray(data_UB[:, : size - width]).view("<f4")
        step_UW = np.ascontiguousarray(data_UB[:, size - width :]).view(np.int8)
        token_UmD: Floats = step_UW.reshape(users, self.tokens, width // self.tokens).astype(np.float32)
        with np.errstate(invalid="ignore", over="ignore"):  # a damaged scale: the numbers are not finite, and refused
            token_UmD *= scale_Um[..., None]
        state_UW = token_UmD.reshape(users, width)
        return state_UW

    def rounding(self, state_UW: Floats) -> Floats:
        """The most by which a number of each state can differ once stored: f32 [U]."""
        if self.name == "float16":  # half a step: 2^-11 of the number, or of the least normal one, 2^-14
            largest_U: Floats = np.abs(state_UW).max(1)
            return np.asarray(np.maximum(largest_U, 2.0**-14) * 2.0**-11, np.float32)
        scale_Um = _scales(state_UW.reshape(len(state_UW), self.tokens, -1))
        return np.asarray(scale_Um.max(1) / 2, np.float32)


def _scales(token_UmD: Floats) -> Floats:
    scale_Um: Floats = np.abs(token_UmD).max(2, initial=0.0) / np.float32(_LARGEST)
    return scale_Um


def as_stored(codec: StateCodec | None, state_UW: Floats) -> Floats:
    """States as a head gets them from the store: f32 [U, W]."""
    return state_UW if codec is None else codec.decode_rows(codec.encode(state_UW))
