"""The precision audit, on inspector answers in the layout of TensorRT 10 and with names of kernels that it has."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jetrt.builder.audit import ACCEPTED, audit, check, tactic_precision
from jetrt.errors import BuildOptionError, EngineBuildError, PrecisionError
from jetrt.known_failures import explain

# Kernels of libnvinfer 10.6.0 (shortened at the tile size), and what they multiply.
KERNELS = {
    "sm80_xmma_fprop_implicit_gemm_f16f16_f16f16_f16_nhwckrsc_nhwc_tilesize256x64x32_stage3_warpsize4x1x1": "fp16",
    "sm80_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc_tilesize": "fp16",
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x128x64_warpgroupsize1x1x1": "bf16",
    "sm86_xmma_sparse_gemm_bf16bf16_bf16f32_f32_tt_t_tilesize": "bf16",
    "sm80_xmma_gemm_f32f32_tf32f32_f32_nn_n_tilesize32x32x64_stage3_warpsize2x1x2_tensor16x8x8": "tf32",
    "sm80_xmma_fprop_implicit_gemm_indexed_f32f32_tf32f32_f32_nhwckrsc_nchw_tilesize": "tf32",
    "sm80_xmma_gemm_f32f32_f32f32_f32_tn_n_tilesize": "fp32",
    "sm50_xmma_deconv_generic_f32f32_f32_f32_nchwkcrs_nchw": "fp32",
    "sm80_xmma_fprop_implicit_gemm_interleaved_i8f32_i8i32_f32_nchw_vect_c_32kcrs_vect_c_32_nchw_vect_c_32": "int8",
    "sm90_xmma_gemm_i8bf16_i8i32_f32_tn_n_tilesize": "int8",
    "sm90_xmma_gemm_e4m3bf16_e4m3f32_f32_tn_n_tilesize": "fp8",
    "sm89_xmma_fprop_implicit_gemm_e4m3f16_e4m3f32_f32_nhwckrsc_nhwc_tilesize": "fp8",
    "sm50_xmma_cublas_gemvx_f16f16_f32_f32_tn_n_int32_unit_n_launch_param": "fp16",
    "sm80_xmma_fprop_avdt_sparse_int8int8_tilesize96x128x32_tapsperload3_threadspercta128_r3s3_u2v2": "int8",
    "sm61_xmma_convolution_trt_depthwise_i8_conv_int8ncxhw4_fp32nchw_int8kcrs_R1_S1_U1_V1_spv4_swish": "int8",
    "sm50_xmma_convolution_trt_depthwiseFP32NHWC4_fp32nhwcx4_fp32nhwcx4_fp32kcrs": "fp32",
    "sm50_xmma_conv_fprop_fused_conv_act_fp32_NCHW_fp32_NCHW_KCRS_fp32_fp32_fp32_Accfloat_1_1_cC1_dC1": "fp32",
    "trt_turing_cutlass_image_network_first_layer_hmma_fprop_f16f16f32_nhwc_nhwc_k64r7s7c4_stride2x2": "fp16",
    "ampere_h16816gemm_256x128_ldg8_nn_v1": "fp16",
    "ampere_h16816cudnn_128x128_ldg8_relu_exp_stages_64x3_large_nhwc_tn_v1": "fp16",
    "ampere_fp16_s16816gemm_fp16_128x128_ldg8_relu_f2f_stages_32x5_nn_v1": "fp16",
    "turing_fp16_s1688gemm_fp16_128x128_ldg8_f2f_nn": "fp16",
    "volta_s884gemm_128x128_ldg8_relu_f2f_nt_v1": "fp16",
    "volta_s884cudnn_fp16_128x128_ldg8_relu_f2f_exp_small_nhwc_tn_v1": "fp16",
    "volta_fp16_sgemm_fp16_128x128_tt_v0": "fp16",
    "turing_fp32_i8816cudnn_int8_256x128_ldg16_relu_small_t1r3s3": "int8",
    "ampere_fp32_icudnn_int8x4_128x32_relu_interior_nn_v1": "int8",
    "ampere_int8_igemm_int8_128x128_ldg4_relu_nn_v0": "int8",
    "volta_int8_i8816gemm": "int8",
    "ampere_hgemm_128x64_nn_v0": "fp16",
    "ampere_sgemm_128x64_nn_v0": "fp32",
    "ampere_scudnn_128x64_relu_interior_nn_v1": "fp32",
    "ampere_scudnn_winograd_128x128_ldg1_ldg4_relu_tile148t_nt_v1": "fp32",
    # cuBLAS, CUTLASS and flash attention
    "cutlass_80_tensorop_f16_s16816gemm_relu_f16_256x128_32x3_tn_align8": "fp16",
    "cutlass_80_tensorop_bf16_s16816gemm_bf16_128x128_64x3_nn_align8": "bf16",
    "cutlass3x_sm90_tensorop_s64x128x16gemm_f16_f16_f32_f16_f16_128x128x64_2x1x1_0_tnn_align8": "fp16",
    "cutlass3x_sm90_tensorop_s64x128x8gemm_tf32_tf32_f32_f32_f32_128x128x32_2x1x1_0_tnn_align4": "tf32",
    "fmha_v2_flash_attention_fp16_64_128_S_128_sm80_kernel_nl": "fp16",
    # These do not say.
    "_gemm_mha_v2_0xbcebb264ff01c4c4f8078856729f8b7e": None,
    "__myl_CastMulMeanAddSqrtDivMulMul_0x88159ac0c686f6ec9db477bbf7b4210b": None,
    "cutlass3x_sm90_tensorop_s64x128x8gemm_f32_f32_f32_f32_f32_128x128x32_2x1x1_0_tnn_align4": None,
    "sm72_trt_dep_sep_conv_turing": None,
    "ampere_s1688gemm_128x128_tn": None,
    "h800_fp16_int8": None,
    "": None,
}


@pytest.mark.parametrize(("name", "precision"), KERNELS.items())
def test_names_of_kernels(name, precision):
    assert tactic_precision(name) == precision


def tensor(name, text, dimensions=(1, 8)):
    return {"Name": name, "Location": "Device", "Dimensions": list(dimensions), "Format/Datatype": text}


def layer(name, kind, inputs, outputs, **others):
    return {
        "Name": name,
        "LayerType": kind,
        "Inputs": [tensor("i", text) for text in inputs],
        "Outputs": [tensor("o", text) for text in outputs],
        "StreamId": 0,
        "Metadata": "",
        **others,
    }


F16 = "Channel major FP16 format where channel % 8 == 0"
F32 = "Row major linear FP32"
CONV = layer("conv1", "CaskConvolution", [F16], [F16], TacticName=next(iter(KERNELS)), TacticValue="0x1")
REFORMAT = layer("Reformatting CopyNode for Input Tensor 0 to conv1", "Reformat", [F32], [F16])
TF32 = layer(
    "fc", "gemm", ["Float", "Float"], ["Float"], TacticName="sm80_xmma_gemm_f32f32_tf32f32_f32_nn_n_tilesize32x32x64"
)
FP32 = layer("head", "CaskConvolution", [F32], [F32], TacticName="ampere_scudnn_128x64_relu_interior_nn_v1")
NORM = layer("__myl_CastMulMeanAddSqrtDivMulMul_myl0_1", "kgen", ["Half"], ["Half"], TacticName="__myl_Cast_0x88159ac0")
MHA = layer(
    "_gemm_mha_v2_myl0_172",
    "kgen",
    ["Half", "Half"],
    ["Half"],
    TacticName="_gemm_mha_v2_0xbcebb264ff01c4c4f8078856729f8b7e",
)


def answer(*layers):
    return json.dumps({"Layers": list(layers), "Bindings": ["x", "y"]})


def run(layers, times, requested):
    return audit(answer(*layers), times, requested)


def test_the_share_is_weighted_by_the_time_of_matrix_layers():
    result = run(
        [REFORMAT, CONV, FP32],
        {REFORMAT["Name"]: [9.0, 9.0], "conv1": [2.9, 3.0, 3.1], "head": [1.0, 1.0, 50.0]},
        "fp16",
    )
    assert result.share == pytest.approx(0.75)  # 3.0 of 3.0 + 1.0: medians, and no time of the reformat
    assert result.shares == {"fp16": pytest.approx(0.75), "fp32": pytest.approx(0.25)}
    assert result.weighted_by == "time"
    assert [row.name for row in result.fallbacks] == ["head"]
    assert result.findings == (
        "precision audit: fp16 was asked for; 75 % of the GEMM and convolution time runs in it, 25 % in fp32",
    )
    assert [row.matrix for row in result.rows] == [False, True, True]
    assert result.rows[0].edges == "fp32 -> fp16"
    check(result, 75)
    with pytest.raises(PrecisionError) as caught:
        check(result, 75.1)
    assert str(caught.value).startswith(
        "75.0 % of the GEMM and convolution time runs in fp16; --require-precision asks for 75.1 %.\n"
        "  fp32: head (1.0000 ms)\n"
    )
    assert caught.value.found == pytest.approx(75)
    assert caught.value.allowed == 75.1


def test_a_fused_layer_is_unknown_inside_unless_its_kernel_says():
    said = layer(
        "__myl_FcCast_myl0_8", "kgen", ["Int8"], ["Half"], TacticName="sm80_xmma_gemm_i8f32_i8i32_f32_tn_n_tile"
    )
    foreign = layer("{ForeignNode[/a/MatMul.../b/Add]}", "Myelin", ["Half"], ["Half"], TacticValue="0x0")
    by_node = layer(
        "__myl_MovResh_myl0_3",
        "kgen",
        ["Half"],
        ["Half"],
        Metadata="[ONNX Layer: /q_proj/MatMul]\x1f[ONNX Layer: /x/Add]",
    )
    bias = layer("__myl_AddMul_myl0_4", "kgen", ["Half"], ["Half"], Metadata="[ONNX Layer: /linear1/Add]")
    by_name = layer("__myl_FcMul_myl0_5", "kgen", ["Half"], ["Half"])
    rows = run([NORM, MHA, said, foreign, by_node, bias, by_name], {}, "fp16").rows
    assert [row.matrix for row in rows] == [False, True, True, True, True, False, True]
    assert [row.precision for row in rows] == ["fp16", "unknown", "int8", "unknown", "unknown", "fp16", "unknown"]
    assert rows[1].edges == "fp16 -> fp16"
    result = run([MHA, CONV], {MHA["Name"]: [1.0], "conv1": [1.0]}, "fp16")
    assert result.share == 0.5
    assert result.fallbacks == ()  # not known to be one
    with pytest.raises(
        PrecisionError, match=r"50\.0 % of .* runs in fp16; .* 95 %\.\n  unknown: _gemm_mha_v2_myl0_172"
    ):
        check(result, 95)


def test_one_kernel_is_told_by_its_operands():
    def precision(kind, inputs, outputs, **others):
        return run([layer("l", kind, inputs, outputs, **others)], {}, "fp16").rows[0].precision

    assert precision("CaskConvolution", [F16], [F32], TacticName="sm72_trt_dep_sep_conv_turing") == "fp16"
    assert precision("CaskConvolution", [F32], [F32]) == "fp32 or tf32"
    assert precision("CaskConvolution", ["Row major Int8 format", F16], [F16], Weights={"Type": "Int8"}) == "int8"
    assert precision("CaskConvolution", [F16], [F16], Weights={"Type": "Float"}) == "unknown"
    assert precision("gemm", ["BFloat16"], ["BFloat16"]) == "bf16"
    assert precision("MatrixMultiply", ["N/A due to dynamic shapes"], ["N/A due to dynamic shapes"]) == "unknown"
    assert precision("CaskConvolution", [], []) == "unknown"
    assert precision("CaskConvolution", ["Int64"], ["Int64"]) == "unknown"
    assert precision("gemm", ["Half(64,1:8,1)"], ["Half(64,1:8,1)"]) == "fp16"


def test_tf32_is_not_fp32():
    result = run([TF32, FP32], {"fc": [3.0], "head": [1.0]}, "fp32")
    assert result.share == 0.25
    assert [row.name for row in result.fallbacks] == ["fc"]
    assert result.findings[1] == (
        "layers multiply in TF32 (10 bits of mantissa) although fp32 was asked for: 1 for certain, 0 perhaps; "
        "the TF32 flag is on unless it is cleared"
    )
    with pytest.raises(PrecisionError, match=r"(?s)tf32: fc .*TF32 flag is on unless it is cleared"):
        check(result, 95)
    # Formats alone cannot tell the two apart: that is no pass either way.
    open_ = layer("c", "CaskConvolution", [F32], [F32])
    for asked in ("fp32", "tf32"):
        result = run([open_], {"c": [1.0]}, asked)
        assert result.share == 0
        assert result.shares == {"fp32 or tf32": 1}
    assert run([open_], {"c": [1.0]}, "fp16").fallbacks == result.rows  # but surely no fp16
    assert run([TF32], {"fc": [1.0]}, "tf32").share == 1


@pytest.mark.parametrize(
    ("requested", "share"),
    [("fp32", 0.4), ("tf32", 0.3), ("fp16", 0.2), ("bf16", 0), ("int8", 0.1), ("fp8", 0), ("mixed", 0.3)],
)
def test_requests(requested, share):
    int8 = layer(
        "q", "CaskConvolution", ["Int8"], ["Int8"], TacticName="turing_int8_i8816cudnn_int8_256x128_ldg16_relu"
    )
    times = {"head": [4.0], "fc": [3.0], "conv1": [2.0], "q": [1.0]}
    assert run([FP32, TF32, CONV, int8], times, requested).share == pytest.approx(share)


def test_an_fp8_request_that_runs_in_fp32_is_a_known_failure():
    result = run([FP32], {"head": [1.0]}, "fp8")
    assert [f.id for f in explain(result.findings, tensorrt=(10, 13, 3), stage="build")] == ["fp8-fp4-in-fp32"]
    assert explain(run([CONV], {"conv1": [1.0]}, "fp16").findings, tensorrt=(10, 13, 3), stage="build") == []


def test_measured_layers_that_the_inspector_does_not_list_are_unknown():
    times = {"conv1": [1.0], "{ForeignNode[a...b]}": [3.0], "Reformatting CopyNode for Output Tensor 0 to x": [5.0]}
    result = run([CONV], times, "fp16")
    assert result.share == 0.25
    assert result.findings[1] == "measured but not listed by the inspector: 2 (8.0000 ms), e.g. '{ForeignNode[a...b]}'"


def test_layers_that_did_not_run_weigh_nothing_and_are_named():
    result = run([CONV, FP32], {"conv1": [1.0]}, "fp16")
    assert result.share == 1
    assert result.findings[-1] == "1 of these layers did not run while the layers were timed, e.g. 'head'"
    result = run([REFORMAT, FP32], {REFORMAT["Name"]: [1.0]}, "fp16")
    assert result.share is None
    with pytest.raises(PrecisionError, match="an unknown part of the GEMM"):
        check(result, 1)


def test_layers_of_one_name_take_their_times_in_order():
    second = {**FP32, "Name": "conv1"}
    result = run([CONV, second], [("conv1", [3.0]), ("conv1", [1.0])], "fp16")
    assert [row.ms for row in result.rows] == [3.0, 1.0]
    assert result.share == 0.75


def test_without_times_every_layer_counts_the_same():
    result = run([CONV, FP32, REFORMAT], {}, "fp16")
    assert (result.share, result.weighted_by) == (0.5, "layers")
    assert "50 % of the GEMM and convolution layers runs in it" in result.findings[0]


def test_names_only():
    result = audit(
        {"Layers": ["Reformatting CopyNode for Input Tensor 0 to /c/Conv", "/c/Conv", "{ForeignNode[a...b]}"]},
        {},
        "fp16",
    )
    assert [row.matrix for row in result.rows] == [False, True, True]
    assert result.share == 0
    assert result.findings[1] == "the inspector gave names only: build with detailed profiling verbosity"
    with pytest.raises(PrecisionError, match="detailed profiling verbosity"):
        check(result, 1)


def test_formats_that_depend_on_shapes():
    open_ = layer("c", "MatrixMultiply", ["N/A due to dynamic shapes"], ["N/A due to dynamic shapes"])
    result = run([open_], {"c": [1.0]}, "fp16")
    assert result.findings[-1] == (
        "the inspector gave no formats for 1 of these layers: inspect with a context whose shapes are set"
    )


def test_nothing_to_require():
    result = run([REFORMAT], {REFORMAT["Name"]: [1.0]}, "fp16")
    assert result.share is None
    assert result.findings == ("precision audit: fp16 was asked for; no GEMM and no convolution in this plan",)
    check(result, 100)
    empty = run([], {}, "fp16")
    assert empty.findings == ("precision audit: fp16 was asked for, and the inspector lists no layer",)
    with pytest.raises(PrecisionError, match="an unknown part"):
        check(empty, 1)


def test_table_and_mapping():
    result = run([REFORMAT, CONV, FP32], {"conv1": [3.0], "head": [1.0], REFORMAT["Name"]: [0.5]}, "fp16")
    lines = result.table().splitlines()
    assert lines[0].split() == ["layer", "type", "precision", "in", "->", "out", "ms", "share"]
    assert lines[1].split() == ["*", "conv1", "CaskConvolution", "fp16", "fp16", "->", "fp16", "3.0000", "66.7", "%"]
    assert lines[2].split()[:4] == ["*", "head", "CaskConvolution", "fp32"]
    assert result.table(limit=1).splitlines()[-1] == "… and 2 more layers"
    mapping = json.loads(json.dumps(result.to_mapping()))
    assert mapping["share"] == 0.75
    assert mapping["fallbacks"] == ["head"]
    assert mapping["layers"][1]["precision"] == "fp16"
    assert mapping["requested"] == "fp16"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "the engine inspector's answer is not JSON"),
        ("[" * 100_000, "the engine inspector's answer is not JSON"),
        ("[]", 'has no list "Layers"'),
        ('{"Layers": 3}', 'has no list "Layers"'),
        ("null", 'has no list "Layers"'),
    ],
)
def test_other_answers_are_refused(text, message):
    with pytest.raises(EngineBuildError, match=message):
        audit(text, {}, "fp16")


def test_an_unknown_request_is_refused():
    with pytest.raises(
        BuildOptionError, match=r"precision 'fp12' cannot be audited; allowed: fp32, tf32, fp16"
    ) as caught:
        audit('{"Layers": []}', {}, "fp12")
    assert caught.value.option == "--precision"


JSON = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(max_size=8) | st.sampled_from(list(KERNELS)),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["Name", "LayerType", "Inputs", "Outputs", "TacticName", "Metadata", "Weights", "Format/Datatype"]
            ),
            inner,
            max_size=6,
        )
    ),
    max_leaves=12,
)
MS = st.lists(st.floats(0, 1e3), max_size=3)


@given(
    st.lists(JSON, max_size=5), st.dictionaries(st.text(max_size=8), MS, max_size=3), st.sampled_from(list(ACCEPTED))
)
def test_any_answer_gives_an_audit(layers, times, requested):
    result = audit({"Layers": layers}, times, requested)
    assert result.share is None or 0 <= result.share <= 1
    assert not result.shares or sum(result.shares.values()) == pytest.approx(1)
    for row in result.rows:
        assert row.possible or row.precision == "unknown"
    json.dumps(result.to_mapping())
    result.table()


@given(st.lists(st.tuples(st.sampled_from([CONV, FP32, TF32, MHA, NORM, REFORMAT]), st.floats(0.001, 10)), max_size=6))
def test_unknown_time_never_raises_the_share(parts):
    layers = [{**part, "Name": f"{part['Name']}{i}"} for i, (part, _) in enumerate(parts)]
    times = {one["Name"]: [ms] for one, (_, ms) in zip(layers, parts, strict=True)}
    share = run(layers, times, "fp16").share or 0
    more = run([*layers, MHA], {**times, MHA["Name"]: [1.0]}, "fp16").share
    assert more <= share + 1e-12
