"""Further families of `zoo_transformers`: mixtures of experts, state spaces, speech, and text with images."""

from __future__ import annotations

from typing import Any

from zoo_transformers import (
    BASE,
    DECODER,
    ENCODER,
    GROUPED,
    LABELS,
    LAYERS,
    PIXELS,
    TOKENS,
    VISION,
    WIDE,
    Family,
    decoder,
    text_encoder,
    vision,
)

EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 40}
LATENT = {
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
}
LATENT |= {"q_lora_rank": 20, "qk_rope_head_dim": 8, "qk_nope_head_dim": 10, "v_head_dim": 12}
LATENT |= {"n_shared_experts": 1, "num_key_value_heads": 6}
JAMBA = {
    **GROUPED,
    "num_experts": 3,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
}
JAMBA |= {"expert_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 6, "use_mamba_kernels": False}
MAMBA = {"vocab_size": TOKENS, "hidden_size": 48, "state_size": 4, "time_step_rank": 6, **LAYERS}
MAMBA |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MAMBA2 = {**MAMBA, "num_heads": 6, "head_dim": 16, "n_groups": 1, "chunk_size": 8}
MAMBA2.pop("time_step_rank")
RWKV = {
    "vocab_size": TOKENS,
    "hidden_size": 48,
    "attention_hidden_size": 48,
    "intermediate_size": 84,
    **LAYERS,
}
BLOOM = {"vocab_size": TOKENS, "hidden_size": 48, "n_layer": 2, "n_head": 6, "pad_token_id": 0}
NEO = {**DECODER, "attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 6}
GPTJ = {"vocab_size": TOKENS, "n_embd": 48, "n_layer": 2, "n_head": 6, "n_inner": 84, "rotary_dim": 4}
GPTJ |= {"n_positions": 40, "bos_token_id": 1, "eos_token_id": 2}
MPT = {
    "vocab_size": TOKENS,
    "d_model": 48,
    "n_heads": 8,
    "n_layers": 2,
    "expansion_ratio": 2,
    "max_seq_len": 40,
}
SPEECH = {**BASE, **LAYERS, "conv_dim": [20, 24], "conv_stride": [4, 2], "conv_kernel": [8, 4]}
SPEECH |= {"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
SPEECH |= {"num_labels": LABELS, "classifier_proj_size": 30, "mask_time_prob": 0.0, "pad_token_id": 0}
SEGFORMER = {"num_encoder_blocks": 2, "depths": [1, 2], "sr_ratios": [2, 1], "hidden_sizes": [24, 48]}
SEGFORMER |= {"patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [2, 4], "mlp_ratios": [2, 2]}
SEGFORMER |= {"decoder_hidden_size": 40, "num_labels": LABELS}
SWIN2 = {"image_size": PIXELS, "patch_size": 2, "embed_dim": 24, "depths": [1, 1], "num_heads": [3, 4]}
SWIN2 |= {"window_size": 4, "num_labels": LABELS}
LLAVA: dict[str, Any] = {
    "text_config": {**GROUPED, "model_type": "llama"},
    "vision_config": {
        **{key: value for key, value in VISION.items() if key != "num_labels"},
        "model_type": "clip_vision_model", "num_hidden_layers": 3, "projection_dim": 28, "patch_size": 16,
    },
    "image_token_index": TOKENS - 1, "vision_feature_layer": -2,
}  # fmt: skip
IDEFICS: dict[str, Any] = {
    "text_config": {**GROUPED, "model_type": "llama"},
    "vision_config": {**VISION, "model_type": "idefics3_vision"},
    "scale_factor": 2, "image_token_id": TOKENS - 1,
    "tie_word_embeddings": False, "pad_token_id": 0,
}  # fmt: skip
XLNET = {"vocab_size": TOKENS, "d_model": 48, "n_layer": 2, "n_head": 6, "d_inner": 84, "num_labels": LABELS}
FUNNEL = {"vocab_size": TOKENS, "block_sizes": [1, 1], "d_model": 48, "n_head": 6, "d_head": 8, "d_inner": 84}
FUNNEL |= {"num_labels": LABELS, "num_decoder_layers": 1}
MOBILEBERT = {**ENCODER, "embedding_size": 20, "intra_bottleneck_size": 24, "num_feedforward_networks": 2}
MOBILEBERT |= {"true_hidden_size": 24, "num_attention_heads": 4}
RESNET = {"embedding_size": 16, "hidden_sizes": [24, 32], "depths": [1, 2], "num_labels": LABELS}
CONVNEXT = {
    "hidden_sizes": [16, 24, 32, 40],
    "depths": [1, 1, 1, 1],
    "num_labels": LABELS,
    "image_size": PIXELS,
}
MOBILEVIT = {
    "image_size": PIXELS,
    "hidden_sizes": [24, 32, 40],
    "neck_hidden_sizes": [8, 12, 16, 20, 24, 28, 48],
}
MOBILEVIT |= {"num_attention_heads": 4, "num_labels": LABELS}
SWITCH = {"vocab_size": TOKENS, "d_model": 48, "d_kv": 10, "d_ff": 84, "num_layers": 2, "num_heads": 6}
SWITCH |= {"num_experts": 3, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
SIGLIP = {
    "text_config": {**ENCODER, "projection_size": 60},
    "vision_config": {**VISION, "hidden_size": 60},
}
GRANITE_MOE = {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}

FAMILIES: dict[str, Family] = {
    "mixtral": decoder("Mixtral", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2-moe": decoder(
        "Qwen2Moe", {**GROUPED, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 60}
    ),
    "qwen3-moe": decoder("Qwen3Moe", {**WIDE, **EXPERTS, "num_experts": 4}),
    "olmoe": decoder("Olmoe", {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2}),
    "gpt-oss": decoder("GptOss", {**WIDE, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek-v3": decoder("DeepseekV3", {**DECODER, **EXPERTS, **LATENT}),
    "llama4": Family(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {
            **WIDE,
            "num_local_experts": 3,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 60,
            "attention_chunk_size": 64,
            "interleave_moe_layer_step": 1,
        },
    ),
    "granite-moe": decoder("GraniteMoe", GRANITE_MOE),
    "phi-moe": decoder("Phimoe", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "jamba": decoder("Jamba", JAMBA),
    "switch": Family(
        "SwitchTransformersForConditionalGeneration", "SwitchTransformersConfig", SWITCH, ("text", "targets")
    ),
    "mamba": decoder("Mamba", MAMBA),
    "mamba2": decoder("Mamba2", MAMBA2),
    "falcon-mamba": decoder("FalconMamba", MAMBA),
    "rwkv": decoder("Rwkv", RWKV),
    "recurrent-gemma": decoder(
        "RecurrentGemma", {**GROUPED, "lru_width": 48, "attention_window_size": 32, "num_hidden_layers": 3}
    ),
    "bloom": decoder("Bloom", BLOOM),
    "falcon": decoder(
        "Falcon", {**DECODER, "multi_query": True, "new_decoder_architecture": False, "ffn_hidden_size": 84}
    ),
    "falcon-new": decoder(
        "Falcon", {**DECODER, "num_kv_heads": 2, "new_decoder_architecture": True, "ffn_hidden_size": 84}
    ),
    "gpt-bigcode": decoder("GPTBigCode", {**GPTJ, "multi_query": True}),
    "gpt-neo": decoder("GPTNeo", NEO),
    "gpt-j": decoder("GPTJ", GPTJ),
    "mpt": decoder("Mpt", MPT),
    "phi": decoder("Phi", {**GROUPED, "partial_rotary_factor": 0.5}),
    "stablelm": decoder("StableLm", GROUPED),
    "cohere": decoder("Cohere", GROUPED),
    "granite": decoder("Granite", GROUPED),
    "gemma2": decoder("Gemma2", WIDE),
    "gemma3": Family("Gemma3ForCausalLM", "Gemma3TextConfig", WIDE),
    "starcoder2": decoder("Starcoder2", GROUPED),
    "xlnet": text_encoder("XLNet", XLNET),
    "funnel": text_encoder("Funnel", FUNNEL),
    "mobilebert": text_encoder("MobileBert", MOBILEBERT),
    "squeezebert": text_encoder("SqueezeBert", {**ENCODER, "embedding_size": 48}),
    "convbert": text_encoder("ConvBert", {**ENCODER, "embedding_size": 48}),
    "nystromformer": text_encoder(
        "Nystromformer", {**ENCODER, "num_landmarks": 13, "segment_means_seq_len": 13}
    ),
    "fnet": text_encoder("FNet", ENCODER),
    "hubert": Family("HubertForSequenceClassification", "HubertConfig", SPEECH, ("waveform",)),
    "wav2vec2": Family("Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", SPEECH, ("waveform",)),
    "wavlm": Family("WavLMForSequenceClassification", "WavLMConfig", SPEECH, ("waveform",)),
    "beit": vision("Beit", VISION),
    "swinv2": vision("Swinv2", SWIN2),
    "segformer": vision("Segformer", SEGFORMER),
    "segformer-segmentation": Family(
        "SegformerForSemanticSegmentation", "SegformerConfig", SEGFORMER, ("image",)
    ),
    "yolos": Family(
        "YolosForObjectDetection",
        "YolosConfig",
        {**VISION, "image_size": [PIXELS, PIXELS], "num_detection_tokens": 7},
        ("image",),
    ),
    "resnet": vision("ResNet", RESNET),
    "convnext": vision("ConvNext", CONVNEXT),
    "mobilevit": vision("MobileViT", MOBILEVIT),
    "siglip": Family("SiglipModel", "SiglipConfig", SIGLIP, ("text", "image")),
    "llava": Family("LlavaForConditionalGeneration", "LlavaConfig", LLAVA, ("text with image",)),
    "idefics3": Family("Idefics3ForConditionalGeneration", "Idefics3Config", IDEFICS, ("text with images",)),
}
