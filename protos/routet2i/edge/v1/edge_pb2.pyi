from routet2i.image.v1 import image_pb2 as _image_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Routing(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROUTING_UNSPECIFIED: _ClassVar[Routing]
    ROUTING_AUTO: _ClassVar[Routing]
    ROUTING_LOCAL_ONLY: _ClassVar[Routing]
    ROUTING_CLOUD_ONLY: _ClassVar[Routing]

class Route(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROUTE_UNSPECIFIED: _ClassVar[Route]
    ROUTE_EDGE: _ClassVar[Route]
    ROUTE_CLOUD: _ClassVar[Route]

class DecisionReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DECISION_REASON_UNSPECIFIED: _ClassVar[DecisionReason]
    DECISION_REASON_PARETO_EDGE: _ClassVar[DecisionReason]
    DECISION_REASON_PARETO_CLOUD: _ClassVar[DecisionReason]
    DECISION_REASON_QUOTA_EXHAUSTED: _ClassVar[DecisionReason]
    DECISION_REASON_CLOUD_UNAVAILABLE: _ClassVar[DecisionReason]
    DECISION_REASON_LOCAL_ONLY: _ClassVar[DecisionReason]
    DECISION_REASON_CLOUD_ONLY: _ClassVar[DecisionReason]
    DECISION_REASON_UNCALIBRATED: _ClassVar[DecisionReason]
    DECISION_REASON_ALREADY_PAID: _ClassVar[DecisionReason]

class ProviderState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PROVIDER_STATE_UNSPECIFIED: _ClassVar[ProviderState]
    PROVIDER_STATE_IN_USE: _ClassVar[ProviderState]
    PROVIDER_STATE_WARMING_UP: _ClassVar[ProviderState]
    PROVIDER_STATE_PASSED_OVER: _ClassVar[ProviderState]

class CloudHealth(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CLOUD_HEALTH_UNSPECIFIED: _ClassVar[CloudHealth]
    CLOUD_HEALTH_NOT_CONFIGURED: _ClassVar[CloudHealth]
    CLOUD_HEALTH_UNTRIED: _ClassVar[CloudHealth]
    CLOUD_HEALTH_HEALTHY: _ClassVar[CloudHealth]
    CLOUD_HEALTH_UNREACHABLE: _ClassVar[CloudHealth]
ROUTING_UNSPECIFIED: Routing
ROUTING_AUTO: Routing
ROUTING_LOCAL_ONLY: Routing
ROUTING_CLOUD_ONLY: Routing
ROUTE_UNSPECIFIED: Route
ROUTE_EDGE: Route
ROUTE_CLOUD: Route
DECISION_REASON_UNSPECIFIED: DecisionReason
DECISION_REASON_PARETO_EDGE: DecisionReason
DECISION_REASON_PARETO_CLOUD: DecisionReason
DECISION_REASON_QUOTA_EXHAUSTED: DecisionReason
DECISION_REASON_CLOUD_UNAVAILABLE: DecisionReason
DECISION_REASON_LOCAL_ONLY: DecisionReason
DECISION_REASON_CLOUD_ONLY: DecisionReason
DECISION_REASON_UNCALIBRATED: DecisionReason
DECISION_REASON_ALREADY_PAID: DecisionReason
PROVIDER_STATE_UNSPECIFIED: ProviderState
PROVIDER_STATE_IN_USE: ProviderState
PROVIDER_STATE_WARMING_UP: ProviderState
PROVIDER_STATE_PASSED_OVER: ProviderState
CLOUD_HEALTH_UNSPECIFIED: CloudHealth
CLOUD_HEALTH_NOT_CONFIGURED: CloudHealth
CLOUD_HEALTH_UNTRIED: CloudHealth
CLOUD_HEALTH_HEALTHY: CloudHealth
CLOUD_HEALTH_UNREACHABLE: CloudHealth

class GenerateRequest(_message.Message):
    __slots__ = ("image", "routing", "preview")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    ROUTING_FIELD_NUMBER: _ClassVar[int]
    PREVIEW_FIELD_NUMBER: _ClassVar[int]
    image: _image_pb2.ImageRequest
    routing: Routing
    preview: bool
    def __init__(self, image: _Optional[_Union[_image_pb2.ImageRequest, _Mapping]] = ..., routing: _Optional[_Union[Routing, str]] = ..., preview: _Optional[bool] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("decision", "progress", "image_chunk", "result")
    DECISION_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    IMAGE_CHUNK_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    decision: Decision
    progress: _image_pb2.Progress
    image_chunk: _image_pb2.ImageChunk
    result: Result
    def __init__(self, decision: _Optional[_Union[Decision, _Mapping]] = ..., progress: _Optional[_Union[_image_pb2.Progress, _Mapping]] = ..., image_chunk: _Optional[_Union[_image_pb2.ImageChunk, _Mapping]] = ..., result: _Optional[_Union[Result, _Mapping]] = ...) -> None: ...

class Decision(_message.Message):
    __slots__ = ("route", "reason", "prs", "alpha", "edge_quality", "cloud_quality", "tokens", "quota", "timings", "edge_model_digest", "cloud_model_digest", "calibration_id", "prompt_truncated", "unfamiliar")
    ROUTE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    PRS_FIELD_NUMBER: _ClassVar[int]
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    EDGE_QUALITY_FIELD_NUMBER: _ClassVar[int]
    CLOUD_QUALITY_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUOTA_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    EDGE_MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    CLOUD_MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    CALIBRATION_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TRUNCATED_FIELD_NUMBER: _ClassVar[int]
    UNFAMILIAR_FIELD_NUMBER: _ClassVar[int]
    route: Route
    reason: DecisionReason
    prs: float
    alpha: float
    edge_quality: _containers.RepeatedCompositeFieldContainer[MetricValue]
    cloud_quality: _containers.RepeatedCompositeFieldContainer[MetricValue]
    tokens: _containers.RepeatedCompositeFieldContainer[TokenPull]
    quota: _containers.RepeatedCompositeFieldContainer[BudgetState]
    timings: _containers.RepeatedCompositeFieldContainer[_image_pb2.Timing]
    edge_model_digest: str
    cloud_model_digest: str
    calibration_id: str
    prompt_truncated: bool
    unfamiliar: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, route: _Optional[_Union[Route, str]] = ..., reason: _Optional[_Union[DecisionReason, str]] = ..., prs: _Optional[float] = ..., alpha: _Optional[float] = ..., edge_quality: _Optional[_Iterable[_Union[MetricValue, _Mapping]]] = ..., cloud_quality: _Optional[_Iterable[_Union[MetricValue, _Mapping]]] = ..., tokens: _Optional[_Iterable[_Union[TokenPull, _Mapping]]] = ..., quota: _Optional[_Iterable[_Union[BudgetState, _Mapping]]] = ..., timings: _Optional[_Iterable[_Union[_image_pb2.Timing, _Mapping]]] = ..., edge_model_digest: _Optional[str] = ..., cloud_model_digest: _Optional[str] = ..., calibration_id: _Optional[str] = ..., prompt_truncated: _Optional[bool] = ..., unfamiliar: _Optional[_Iterable[str]] = ...) -> None: ...

class MetricValue(_message.Message):
    __slots__ = ("name", "value")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    name: str
    value: float
    def __init__(self, name: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...

class TokenPull(_message.Message):
    __slots__ = ("text", "pull", "prs_without")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    PULL_FIELD_NUMBER: _ClassVar[int]
    PRS_WITHOUT_FIELD_NUMBER: _ClassVar[int]
    text: str
    pull: _containers.RepeatedCompositeFieldContainer[MetricValue]
    prs_without: float
    def __init__(self, text: _Optional[str] = ..., pull: _Optional[_Iterable[_Union[MetricValue, _Mapping]]] = ..., prs_without: _Optional[float] = ...) -> None: ...

class BudgetState(_message.Message):
    __slots__ = ("name", "window", "cap_micro_usd", "spent_micro_usd", "reserved_micro_usd", "remaining_micro_usd", "app")
    NAME_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    CAP_MICRO_USD_FIELD_NUMBER: _ClassVar[int]
    SPENT_MICRO_USD_FIELD_NUMBER: _ClassVar[int]
    RESERVED_MICRO_USD_FIELD_NUMBER: _ClassVar[int]
    REMAINING_MICRO_USD_FIELD_NUMBER: _ClassVar[int]
    APP_FIELD_NUMBER: _ClassVar[int]
    name: str
    window: str
    cap_micro_usd: int
    spent_micro_usd: int
    reserved_micro_usd: int
    remaining_micro_usd: int
    app: str
    def __init__(self, name: _Optional[str] = ..., window: _Optional[str] = ..., cap_micro_usd: _Optional[int] = ..., spent_micro_usd: _Optional[int] = ..., reserved_micro_usd: _Optional[int] = ..., remaining_micro_usd: _Optional[int] = ..., app: _Optional[str] = ...) -> None: ...

class Result(_message.Message):
    __slots__ = ("request_id", "image", "served_by", "fallback", "fallback_error", "cost_micro_usd", "timings", "edge_model_digest", "cloud_model_digest", "queue_position")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    SERVED_BY_FIELD_NUMBER: _ClassVar[int]
    FALLBACK_FIELD_NUMBER: _ClassVar[int]
    FALLBACK_ERROR_FIELD_NUMBER: _ClassVar[int]
    COST_MICRO_USD_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    EDGE_MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    CLOUD_MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    QUEUE_POSITION_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    image: _image_pb2.ImageInfo
    served_by: Route
    fallback: bool
    fallback_error: str
    cost_micro_usd: int
    timings: _containers.RepeatedCompositeFieldContainer[_image_pb2.Timing]
    edge_model_digest: str
    cloud_model_digest: str
    queue_position: int
    def __init__(self, request_id: _Optional[str] = ..., image: _Optional[_Union[_image_pb2.ImageInfo, _Mapping]] = ..., served_by: _Optional[_Union[Route, str]] = ..., fallback: _Optional[bool] = ..., fallback_error: _Optional[str] = ..., cost_micro_usd: _Optional[int] = ..., timings: _Optional[_Iterable[_Union[_image_pb2.Timing, _Mapping]]] = ..., edge_model_digest: _Optional[str] = ..., cloud_model_digest: _Optional[str] = ..., queue_position: _Optional[int] = ...) -> None: ...

class RouteRequest(_message.Message):
    __slots__ = ("image", "routing", "explain")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    ROUTING_FIELD_NUMBER: _ClassVar[int]
    EXPLAIN_FIELD_NUMBER: _ClassVar[int]
    image: _image_pb2.ImageRequest
    routing: Routing
    explain: bool
    def __init__(self, image: _Optional[_Union[_image_pb2.ImageRequest, _Mapping]] = ..., routing: _Optional[_Union[Routing, str]] = ..., explain: _Optional[bool] = ...) -> None: ...

class RouteResponse(_message.Message):
    __slots__ = ("decision",)
    DECISION_FIELD_NUMBER: _ClassVar[int]
    decision: Decision
    def __init__(self, decision: _Optional[_Union[Decision, _Mapping]] = ...) -> None: ...

class GetQuotaRequest(_message.Message):
    __slots__ = ("app",)
    APP_FIELD_NUMBER: _ClassVar[int]
    app: str
    def __init__(self, app: _Optional[str] = ...) -> None: ...

class GetQuotaResponse(_message.Message):
    __slots__ = ("budgets", "rates")
    BUDGETS_FIELD_NUMBER: _ClassVar[int]
    RATES_FIELD_NUMBER: _ClassVar[int]
    budgets: _containers.RepeatedCompositeFieldContainer[BudgetState]
    rates: _containers.RepeatedCompositeFieldContainer[RateState]
    def __init__(self, budgets: _Optional[_Iterable[_Union[BudgetState, _Mapping]]] = ..., rates: _Optional[_Iterable[_Union[RateState, _Mapping]]] = ...) -> None: ...

class RateState(_message.Message):
    __slots__ = ("name", "max_calls", "per_seconds", "calls")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MAX_CALLS_FIELD_NUMBER: _ClassVar[int]
    PER_SECONDS_FIELD_NUMBER: _ClassVar[int]
    CALLS_FIELD_NUMBER: _ClassVar[int]
    name: str
    max_calls: int
    per_seconds: float
    calls: int
    def __init__(self, name: _Optional[str] = ..., max_calls: _Optional[int] = ..., per_seconds: _Optional[float] = ..., calls: _Optional[int] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[Model]
    def __init__(self, models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("side", "name", "digest", "licence", "width", "height", "steps", "default_steps", "default_guidance_scale", "price_micro_usd", "sizes")
    SIDE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    LICENCE_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_STEPS_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_GUIDANCE_SCALE_FIELD_NUMBER: _ClassVar[int]
    PRICE_MICRO_USD_FIELD_NUMBER: _ClassVar[int]
    SIZES_FIELD_NUMBER: _ClassVar[int]
    side: Route
    name: str
    digest: str
    licence: str
    width: int
    height: int
    steps: _containers.RepeatedScalarFieldContainer[int]
    default_steps: int
    default_guidance_scale: float
    price_micro_usd: int
    sizes: _containers.RepeatedCompositeFieldContainer[ImageSize]
    def __init__(self, side: _Optional[_Union[Route, str]] = ..., name: _Optional[str] = ..., digest: _Optional[str] = ..., licence: _Optional[str] = ..., width: _Optional[int] = ..., height: _Optional[int] = ..., steps: _Optional[_Iterable[int]] = ..., default_steps: _Optional[int] = ..., default_guidance_scale: _Optional[float] = ..., price_micro_usd: _Optional[int] = ..., sizes: _Optional[_Iterable[_Union[ImageSize, _Mapping]]] = ...) -> None: ...

class ImageSize(_message.Message):
    __slots__ = ("width", "height")
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    width: int
    height: int
    def __init__(self, width: _Optional[int] = ..., height: _Optional[int] = ...) -> None: ...

class ReloadModelRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class ReloadModelResponse(_message.Message):
    __slots__ = ("bundle", "edge_model_digest", "calibrated")
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    EDGE_MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    CALIBRATED_FIELD_NUMBER: _ClassVar[int]
    bundle: str
    edge_model_digest: str
    calibrated: bool
    def __init__(self, bundle: _Optional[str] = ..., edge_model_digest: _Optional[str] = ..., calibrated: _Optional[bool] = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("version", "uptime_seconds", "bundle", "edge_model_digest", "cloud_model_digest", "calibration_id", "calibrated", "routing_rate", "alpha", "cloud_address", "cloud_health", "queue_length", "max_queue", "served_by_edge", "served_by_cloud", "fallbacks", "unresolved_reservations", "advice", "providers", "loaded", "loaded_since", "keep_alive_seconds", "predecessors", "models_folder", "paced_rate")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    UPTIME_SECONDS_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    EDGE_MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    CLOUD_MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    CALIBRATION_ID_FIELD_NUMBER: _ClassVar[int]
    CALIBRATED_FIELD_NUMBER: _ClassVar[int]
    ROUTING_RATE_FIELD_NUMBER: _ClassVar[int]
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    CLOUD_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    CLOUD_HEALTH_FIELD_NUMBER: _ClassVar[int]
    QUEUE_LENGTH_FIELD_NUMBER: _ClassVar[int]
    MAX_QUEUE_FIELD_NUMBER: _ClassVar[int]
    SERVED_BY_EDGE_FIELD_NUMBER: _ClassVar[int]
    SERVED_BY_CLOUD_FIELD_NUMBER: _ClassVar[int]
    FALLBACKS_FIELD_NUMBER: _ClassVar[int]
    UNRESOLVED_RESERVATIONS_FIELD_NUMBER: _ClassVar[int]
    ADVICE_FIELD_NUMBER: _ClassVar[int]
    PROVIDERS_FIELD_NUMBER: _ClassVar[int]
    LOADED_FIELD_NUMBER: _ClassVar[int]
    LOADED_SINCE_FIELD_NUMBER: _ClassVar[int]
    KEEP_ALIVE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    PREDECESSORS_FIELD_NUMBER: _ClassVar[int]
    MODELS_FOLDER_FIELD_NUMBER: _ClassVar[int]
    PACED_RATE_FIELD_NUMBER: _ClassVar[int]
    version: str
    uptime_seconds: float
    bundle: str
    edge_model_digest: str
    cloud_model_digest: str
    calibration_id: str
    calibrated: bool
    routing_rate: float
    alpha: float
    cloud_address: str
    cloud_health: CloudHealth
    queue_length: int
    max_queue: int
    served_by_edge: int
    served_by_cloud: int
    fallbacks: int
    unresolved_reservations: int
    advice: _containers.RepeatedScalarFieldContainer[str]
    providers: _containers.RepeatedCompositeFieldContainer[Provider]
    loaded: bool
    loaded_since: float
    keep_alive_seconds: float
    predecessors: _containers.RepeatedScalarFieldContainer[str]
    models_folder: str
    paced_rate: float
    def __init__(self, version: _Optional[str] = ..., uptime_seconds: _Optional[float] = ..., bundle: _Optional[str] = ..., edge_model_digest: _Optional[str] = ..., cloud_model_digest: _Optional[str] = ..., calibration_id: _Optional[str] = ..., calibrated: _Optional[bool] = ..., routing_rate: _Optional[float] = ..., alpha: _Optional[float] = ..., cloud_address: _Optional[str] = ..., cloud_health: _Optional[_Union[CloudHealth, str]] = ..., queue_length: _Optional[int] = ..., max_queue: _Optional[int] = ..., served_by_edge: _Optional[int] = ..., served_by_cloud: _Optional[int] = ..., fallbacks: _Optional[int] = ..., unresolved_reservations: _Optional[int] = ..., advice: _Optional[_Iterable[str]] = ..., providers: _Optional[_Iterable[_Union[Provider, _Mapping]]] = ..., loaded: _Optional[bool] = ..., loaded_since: _Optional[float] = ..., keep_alive_seconds: _Optional[float] = ..., predecessors: _Optional[_Iterable[str]] = ..., models_folder: _Optional[str] = ..., paced_rate: _Optional[float] = ...) -> None: ...

class Provider(_message.Message):
    __slots__ = ("name", "state", "reason")
    NAME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    name: str
    state: ProviderState
    reason: str
    def __init__(self, name: _Optional[str] = ..., state: _Optional[_Union[ProviderState, str]] = ..., reason: _Optional[str] = ...) -> None: ...
