from routet2i.image.v1 import image_pb2 as _image_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GenerationState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    GENERATION_STATE_UNSPECIFIED: _ClassVar[GenerationState]
    GENERATION_STATE_UNKNOWN: _ClassVar[GenerationState]
    GENERATION_STATE_RUNNING: _ClassVar[GenerationState]
    GENERATION_STATE_FINISHED: _ClassVar[GenerationState]
    GENERATION_STATE_FAILED: _ClassVar[GenerationState]
    GENERATION_STATE_CANCELLED: _ClassVar[GenerationState]
GENERATION_STATE_UNSPECIFIED: GenerationState
GENERATION_STATE_UNKNOWN: GenerationState
GENERATION_STATE_RUNNING: GenerationState
GENERATION_STATE_FINISHED: GenerationState
GENERATION_STATE_FAILED: GenerationState
GENERATION_STATE_CANCELLED: GenerationState

class GenerateRequest(_message.Message):
    __slots__ = ("image", "preview")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    PREVIEW_FIELD_NUMBER: _ClassVar[int]
    image: _image_pb2.ImageRequest
    preview: bool
    def __init__(self, image: _Optional[_Union[_image_pb2.ImageRequest, _Mapping]] = ..., preview: _Optional[bool] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("accepted", "progress", "image_chunk", "result")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    IMAGE_CHUNK_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    accepted: Accepted
    progress: _image_pb2.Progress
    image_chunk: _image_pb2.ImageChunk
    result: Result
    def __init__(self, accepted: _Optional[_Union[Accepted, _Mapping]] = ..., progress: _Optional[_Union[_image_pb2.Progress, _Mapping]] = ..., image_chunk: _Optional[_Union[_image_pb2.ImageChunk, _Mapping]] = ..., result: _Optional[_Union[Result, _Mapping]] = ...) -> None: ...

class Accepted(_message.Message):
    __slots__ = ("queue_position", "charged_micro_usd", "model_digest")
    QUEUE_POSITION_FIELD_NUMBER: _ClassVar[int]
    CHARGED_MICRO_USD_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    queue_position: int
    charged_micro_usd: int
    model_digest: str
    def __init__(self, queue_position: _Optional[int] = ..., charged_micro_usd: _Optional[int] = ..., model_digest: _Optional[str] = ...) -> None: ...

class Result(_message.Message):
    __slots__ = ("request_id", "image", "charged_micro_usd", "timings")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    CHARGED_MICRO_USD_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    image: _image_pb2.ImageInfo
    charged_micro_usd: int
    timings: _containers.RepeatedCompositeFieldContainer[_image_pb2.Timing]
    def __init__(self, request_id: _Optional[str] = ..., image: _Optional[_Union[_image_pb2.ImageInfo, _Mapping]] = ..., charged_micro_usd: _Optional[int] = ..., timings: _Optional[_Iterable[_Union[_image_pb2.Timing, _Mapping]]] = ...) -> None: ...

class GetModelRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetModelResponse(_message.Message):
    __slots__ = ("model_digest", "name", "licence", "sizes", "default_steps", "max_steps", "default_guidance_scale", "price_micro_usd", "queue_length", "max_queue")
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    LICENCE_FIELD_NUMBER: _ClassVar[int]
    SIZES_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_STEPS_FIELD_NUMBER: _ClassVar[int]
    MAX_STEPS_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_GUIDANCE_SCALE_FIELD_NUMBER: _ClassVar[int]
    PRICE_MICRO_USD_FIELD_NUMBER: _ClassVar[int]
    QUEUE_LENGTH_FIELD_NUMBER: _ClassVar[int]
    MAX_QUEUE_FIELD_NUMBER: _ClassVar[int]
    model_digest: str
    name: str
    licence: str
    sizes: _containers.RepeatedCompositeFieldContainer[ImageSize]
    default_steps: int
    max_steps: int
    default_guidance_scale: float
    price_micro_usd: int
    queue_length: int
    max_queue: int
    def __init__(self, model_digest: _Optional[str] = ..., name: _Optional[str] = ..., licence: _Optional[str] = ..., sizes: _Optional[_Iterable[_Union[ImageSize, _Mapping]]] = ..., default_steps: _Optional[int] = ..., max_steps: _Optional[int] = ..., default_guidance_scale: _Optional[float] = ..., price_micro_usd: _Optional[int] = ..., queue_length: _Optional[int] = ..., max_queue: _Optional[int] = ...) -> None: ...

class ImageSize(_message.Message):
    __slots__ = ("width", "height")
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    width: int
    height: int
    def __init__(self, width: _Optional[int] = ..., height: _Optional[int] = ...) -> None: ...

class LookupGenerationRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class LookupGenerationResponse(_message.Message):
    __slots__ = ("request_id", "state", "charged", "charged_micro_usd", "sha256")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    CHARGED_FIELD_NUMBER: _ClassVar[int]
    CHARGED_MICRO_USD_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    state: GenerationState
    charged: bool
    charged_micro_usd: int
    sha256: str
    def __init__(self, request_id: _Optional[str] = ..., state: _Optional[_Union[GenerationState, str]] = ..., charged: _Optional[bool] = ..., charged_micro_usd: _Optional[int] = ..., sha256: _Optional[str] = ...) -> None: ...
