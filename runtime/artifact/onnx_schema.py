"""Messages and fields of ``onnx.proto`` up to IR version 14, and what a reader does with each.

Source: ``onnx.proto`` of onnx 1.23.
"""

from __future__ import annotations

ELEMENT_TYPES: dict[int, str] = {
    1: "float32",
    2: "uint8",
    3: "int8",
    4: "uint16",
    5: "int16",
    6: "int32",
    7: "int64",
    8: "string",
    9: "bool",
    10: "float16",
    11: "float64",
    12: "uint32",
    13: "uint64",
    14: "complex64",
    15: "complex128",
    16: "bfloat16",
    17: "float8e4m3fn",
    18: "float8e4m3fnuz",
    19: "float8e5m2",
    20: "float8e5m2fnuz",
    21: "uint4",
    22: "int4",
    23: "float4e2m1",
    24: "float8e8m0",
    25: "uint2",
    26: "int2",
}
"""Names of ``TensorProto.DataType``, as numpy and ml_dtypes call them."""

# Kinds of a field. A kind that starts with a capital is a message type of the table.
INT = "int"  # one varint, kept
INTS = "ints"  # repeated varint, packed or not, kept
TEXT = "text"  # UTF-8, kept
TEXTS = "texts"  # repeated UTF-8, kept
SIZE = "size"  # bytes; their length is kept, summed over repetitions
SKIP_TEXT = "skip text"  # bytes, may repeat, dropped
SKIP_VARINT = "skip varint"  # varint, packed or not, may repeat; payload length summed
SKIP_4 = "skip 4"  # 32 bit, packed or not, may repeat; payload length summed
SKIP_8 = "skip 8"  # 64 bit, packed or not, may repeat; payload length summed

Field = tuple[str, str, bool]


def _many(name: str, message: str) -> Field:
    return (name, message, True)


def _one(name: str, kind: str) -> Field:
    return (name, kind, False)


_METADATA = _many("metadata_props", "StringStringEntryProto")
_DOC = ("doc_string", SKIP_TEXT, True)

SCHEMA: dict[str, dict[int, Field]] = {
    "ModelProto": {
        1: _one("ir_version", INT),
        2: _one("producer_name", SKIP_TEXT),
        3: _one("producer_version", SKIP_TEXT),
        4: _one("domain", SKIP_TEXT),
        5: _one("model_version", SKIP_VARINT),
        6: _DOC,
        7: _one("graph", "GraphProto"),
        8: _many("opset_import", "OperatorSetIdProto"),
        14: _METADATA,
        20: _many("training_info", "TrainingInfoProto"),
        25: _many("functions", "FunctionProto"),
        26: _many("configuration", "DeviceConfigurationProto"),
    },
    "GraphProto": {
        1: _many("node", "NodeProto"),
        2: _one("name", SKIP_TEXT),
        5: _many("initializer", "TensorProto"),
        10: _DOC,
        11: _many("input", "ValueInfoProto"),
        12: _many("output", "ValueInfoProto"),
        13: _many("value_info", "ValueInfoProto"),
        14: _many("quantization_annotation", "TensorAnnotation"),
        15: _many("sparse_initializer", "SparseTensorProto"),
        16: _METADATA,
    },
    "NodeProto": {
        1: _many("input", TEXTS),
        2: _many("output", TEXTS),
        3: _one("name", TEXT),
        4: _one("op_type", TEXT),
        5: _many("attribute", "AttributeProto"),
        6: _DOC,
        7: _one("domain", TEXT),
        8: _one("overload", TEXT),
        9: _METADATA,
        10: _many("device_configurations", "NodeDeviceConfigurationProto"),
    },
    "AttributeProto": {
        1: _one("name", TEXT),
        2: _one("f", SKIP_4),
        3: _one("i", SKIP_VARINT),
        4: _one("s", SKIP_TEXT),
        5: _one("t", "TensorProto"),
        6: _one("g", "GraphProto"),
        7: _many("floats", SKIP_4),
        8: _many("ints", SKIP_VARINT),
        9: _many("strings", SKIP_TEXT),
        10: _many("tensors", "TensorProto"),
        11: _many("graphs", "GraphProto"),
        13: _DOC,
        14: _one("tp", "TypeProto"),
        15: _many("type_protos", "TypeProto"),
        20: _one("type", INT),
        21: _one("ref_attr_name", SKIP_TEXT),
        22: _one("sparse_tensor", "SparseTensorProto"),
        23: _many("sparse_tensors", "SparseTensorProto"),
    },
    "TensorProto": {
        1: _many("dims", INTS),
        2: _one("data_type", INT),
        3: _one("segment", "TensorProto.Segment"),
        4: _many("float_data", SKIP_4),
        5: _many("int32_data", SKIP_VARINT),
        6: _many("string_data", SIZE),
        7: _many("int64_data", SKIP_VARINT),
        8: _one("name", TEXT),
        9: _one("raw_data", SIZE),
        10: _many("double_data", SKIP_8),
        11: _many("uint64_data", SKIP_VARINT),
        12: _DOC,
        13: _many("external_data", "StringStringEntryProto"),
        14: _one("data_location", INT),
        16: _METADATA,
    },
    "TensorProto.Segment": {1: _one("begin", SKIP_VARINT), 2: _one("end", SKIP_VARINT)},
    "SparseTensorProto": {
        1: _one("values", "TensorProto"),
        2: _one("indices", "TensorProto"),
        3: _many("dims", INTS),
    },
    "ValueInfoProto": {
        1: _one("name", TEXT),
        2: _one("type", "TypeProto"),
        3: _DOC,
        4: _METADATA,
    },
    "TypeProto": {
        1: _one("tensor_type", "TypeProto.Tensor"),
        4: _one("sequence_type", "TypeProto.Sequence"),
        5: _one("map_type", "TypeProto.Map"),
        6: _one("denotation", SKIP_TEXT),
        7: _one("opaque_type", "TypeProto.Opaque"),
        8: _one("sparse_tensor_type", "TypeProto.Tensor"),
        9: _one("optional_type", "TypeProto.Sequence"),
    },
    "TypeProto.Tensor": {1: _one("elem_type", INT), 2: _one("shape", "TensorShapeProto")},
    "TypeProto.Sequence": {1: _one("elem_type", "TypeProto")},
    "TypeProto.Map": {1: _one("key_type", INT), 2: _one("value_type", "TypeProto")},
    "TypeProto.Opaque": {1: _one("domain", SKIP_TEXT), 2: _one("name", SKIP_TEXT)},
    "TensorShapeProto": {1: _many("dim", "TensorShapeProto.Dimension")},
    "TensorShapeProto.Dimension": {
        1: _one("dim_value", INT),
        2: _one("dim_param", TEXT),
        3: _one("denotation", SKIP_TEXT),
    },
    "OperatorSetIdProto": {1: _one("domain", TEXT), 2: _one("version", INT)},
    "StringStringEntryProto": {1: _one("key", TEXT), 2: _one("value", TEXT)},
    "TensorAnnotation": {
        1: _one("tensor_name", SKIP_TEXT),
        2: _many("quant_parameter_tensor_names", "StringStringEntryProto"),
    },
    "TrainingInfoProto": {
        1: _one("initialization", "GraphProto"),
        2: _one("algorithm", "GraphProto"),
        3: _many("initialization_binding", "StringStringEntryProto"),
        4: _many("update_binding", "StringStringEntryProto"),
    },
    "FunctionProto": {
        1: _one("name", TEXT),
        4: _many("input", SKIP_TEXT),
        5: _many("output", SKIP_TEXT),
        6: _many("attribute", SKIP_TEXT),
        7: _many("node", "NodeProto"),
        8: _DOC,
        9: _many("opset_import", "OperatorSetIdProto"),
        10: _one("domain", TEXT),
        11: _many("attribute_proto", "AttributeProto"),
        12: _many("value_info", "ValueInfoProto"),
        13: _one("overload", TEXT),
        14: _METADATA,
    },
    "DeviceConfigurationProto": {
        1: _one("name", SKIP_TEXT),
        2: _one("num_devices", SKIP_VARINT),
        3: _many("device", SKIP_TEXT),
    },
    "NodeDeviceConfigurationProto": {
        1: _one("configuration_id", SKIP_TEXT),
        2: _many("sharding_spec", "ShardingSpecProto"),
        3: _one("pipeline_stage", SKIP_VARINT),
    },
    "ShardingSpecProto": {
        1: _one("tensor_name", SKIP_TEXT),
        2: _many("device", SKIP_VARINT),
        3: _many("index_to_device_group_map", "IntIntListEntryProto"),
        4: _many("sharded_dim", "ShardedDimProto"),
    },
    "IntIntListEntryProto": {1: _one("key", SKIP_VARINT), 2: _many("value", SKIP_VARINT)},
    "ShardedDimProto": {
        1: _one("axis", SKIP_VARINT),
        2: _many("simple_sharding", "SimpleShardedDimProto"),
    },
    "SimpleShardedDimProto": {
        1: _one("dim_value", SKIP_VARINT),
        2: _one("dim_param", SKIP_TEXT),
        3: _one("num_shards", SKIP_VARINT),
    },
}

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
SCALAR_WIRE = {
    INT: VARINT,
    INTS: VARINT,
    SKIP_VARINT: VARINT,
    SKIP_4: FIXED32,
    SKIP_8: FIXED64,
}
