"""What consumers know by name: facts out of their sources, for the rules of `lint`.

mlx-lm 0.32.2: `models/` (a module to a model type, the fields of its `ModelArgs` without and with a default) and
`utils.MODEL_REMAPPING`. llama.cpp as of llama-cpp-python 0.3.36: `conversion/__init__.TEXT_MODEL_MAP`. vLLM 0.32.0: the
models that set `is_3d_moe_weight`, and the ranks that `--max-lora-rank` can take.
"""

from __future__ import annotations

MLX_MODEL_TYPES = frozenset(
    """
    Klear afm7 afmoe apertus baichuan_m1 bailing_hybrid bailing_moe bailing_moe_linear bailing_moe_v3 bitnet cohere
    cohere2 dbrx deepseek deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v41 dots1 ernie4_5 ernie4_5_moe exaone
    exaone4 exaone_moe falcon_h1 gear gemma gemma2 gemma3 gemma3_text gemma3n gemma4 gemma4_text glm glm4 glm4_moe
    glm4_moe_lite glm_moe_dsa gpt2 gpt_bigcode gpt_neox gpt_oss gptj granite granitemoe granitemoehybrid helium
    hunyuan hunyuan_v1_dense internlm2 internlm3 iquestloopcoder jamba kimi_k25 kimi_k3 kimi_linear kimi_vl laguna
    lfm2-vl lfm2 lfm2_moe lille-130m llama llama4 llama4_text longcat_flash longcat_flash_ngram mamba mamba2 mellum
    mimo mimo_v2_flash minicpm minicpm3 minimax minimax_m3_vl ministral3 mistral3 mistral4 mixtral muse_glimmer
    muse_spark nanbeige nanochat nemotron-nas nemotron nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe openelm phi
    phi3 phi3small phimoe phixtral pixtral plamo plamo2 plamo3 prism_hadamard_qwen35 qwen qwen2 qwen2_moe qwen2_vl
    qwen3 qwen3_5 qwen3_5_moe qwen3_moe qwen3_next qwen3_vl qwen3_vl_moe recurrent_gemma rwkv7 seed_oss smollm3
    spark2_5 stablelm starcoder2 step3p5 talkie telechat3 youtu_llm
    """.split()
)
# A model type to the one whose module serves it.
MLX_RENAMED = {
    "mistral": "llama",
    "llava": "mistral3",
    "phi-msft": "phixtral",
    "falcon_mamba": "mamba",
    "joyai_llm_flash": "deepseek_v3",
    "kimi_k2": "deepseek_v3",
    "qwen2_5_vl": "qwen2_vl",
    "minimax_m2": "minimax",
    "iquestcoder": "llama",
    "xverse": "llama",
    "gemma4_unified": "gemma4",
    "deepseek_v41_text": "deepseek_v41",
}
# Fields of config.json without which a model's ModelArgs cannot be made, beside those that every config has.
MLX_REQUIRED: dict[str, frozenset[str]] = {
    name: frozenset(fields.split())
    for name, fields in {
        "qwen2": "num_key_value_heads",
        "qwen3": "num_key_value_heads max_position_embeddings head_dim tie_word_embeddings",
        "qwen2_moe": "num_experts_per_tok num_experts moe_intermediate_size shared_expert_intermediate_size",
        "qwen3_moe": "num_experts num_experts_per_tok decoder_sparse_step mlp_only_layers moe_intermediate_size num_key_value_heads head_dim rope_theta tie_word_embeddings max_position_embeddings norm_topk_prob",
        "gemma": "head_dim num_key_value_heads",
        "gemma2": "head_dim num_key_value_heads",
        "gpt2": "n_ctx n_embd n_head n_layer n_positions layer_norm_epsilon",
        "gpt_neox": "max_position_embeddings layer_norm_eps rotary_emb_base rotary_pct",
        "olmo": "d_model n_layers mlp_hidden_size n_heads embedding_size",
        "olmo3": "max_position_embeddings sliding_window rope_theta",
        "olmoe": "num_experts num_experts_per_tok",
        "granite": "logits_scaling attention_multiplier embedding_multiplier residual_multiplier max_position_embeddings num_key_value_heads attention_bias mlp_bias rope_theta",
        "granitemoe": "logits_scaling attention_multiplier embedding_multiplier residual_multiplier max_position_embeddings num_key_value_heads attention_bias rope_theta num_local_experts num_experts_per_tok",
        "starcoder2": "num_key_value_heads",
        "stablelm": "num_key_value_heads rope_theta use_qkv_bias partial_rotary_factor layer_norm_eps",
        "glm4": "attention_bias head_dim num_key_value_heads partial_rotary_factor rope_theta",
        "glm4_moe": "max_position_embeddings moe_intermediate_size norm_topk_prob n_group head_dim topk_group n_shared_experts n_routed_experts routed_scaling_factor num_experts_per_tok first_k_dense_replace num_key_value_heads rope_theta rope_scaling use_qk_norm tie_word_embeddings attention_bias partial_rotary_factor",
        "ernie4_5": "max_position_embeddings num_key_value_heads head_dim rope_theta use_bias tie_word_embeddings",
        "ernie4_5_moe": "max_position_embeddings num_key_value_heads rope_theta use_bias tie_word_embeddings moe_num_experts",
        "hunyuan_v1_dense": "num_key_value_heads",
        "lfm2": "num_key_value_heads max_position_embeddings norm_eps conv_bias conv_L_cache block_dim block_multiple_of block_ffn_dim_multiplier block_auto_adjust_ff_dim",
        "lfm2_moe": "moe_intermediate_size num_experts num_experts_per_tok norm_topk_prob num_key_value_heads max_position_embeddings use_expert_bias num_dense_layers norm_eps conv_bias conv_L_cache",
        "minimax": "num_key_value_heads max_position_embeddings num_experts_per_tok num_local_experts shared_intermediate_size rope_theta rotary_dim",
        "dots1": "max_position_embeddings num_key_value_heads first_k_dense_replace moe_intermediate_size n_routed_experts n_shared_experts norm_topk_prob num_experts_per_tok rope_theta routed_scaling_factor",
        "exaone4": "num_key_value_heads max_position_embeddings rope_theta head_dim tie_word_embeddings rope_scaling sliding_window sliding_window_pattern",
        "seed_oss": "num_key_value_heads head_dim",
        "mellum": "num_experts num_experts_per_tok moe_intermediate_size num_key_value_heads head_dim tie_word_embeddings max_position_embeddings norm_topk_prob sliding_window layer_types",
        "jamba": "num_key_value_heads attn_layer_offset attn_layer_period expert_layer_offset expert_layer_period mamba_d_conv mamba_d_state mamba_expand num_experts num_experts_per_tok max_position_embeddings",
    }.items()
}
# What a missing top-level rope_theta is taken for, by models that do not look into rope_parameters.
MLX_ROPE_DEFAULT: dict[str, float] = {
    "llama": 10_000.0,
    "mixtral": 1_000_000.0,
    "qwen2": 1_000_000.0,
    "qwen2_moe": 1_000_000.0,
    "gemma": 10_000.0,
    "gemma2": 10_000.0,
    "phi": 10_000.0,
    "phi3": 10_000.0,
    "phimoe": 10_000.0,
    "olmo": 10_000.0,
    "olmo2": 10_000.0,
    "olmoe": 10_000.0,
    "cohere": 8_000_000.0,
    "cohere2": 50_000.0,
    "starcoder2": 100_000.0,
    "gpt_oss": 150_000.0,
    "deepseek_v2": 10_000.0,
    "deepseek_v3": 10_000.0,
    "hunyuan_v1_dense": 10_000.0,
    "seed_oss": 10_000.0,
}

# Models of mlx-lm whose routers are layers of their own, which take no LoRA.
MLX_OWN_ROUTERS = frozenset(
    """
    bailing_hybrid bailing_moe bailing_moe_linear bailing_moe_v3 dbrx deepseek deepseek_v2 deepseek_v3 deepseek_v32
    deepseek_v41 dots1 exaone_moe gemma4_text glm4_moe glm4_moe_lite glm_moe_dsa hunyuan laguna longcat_flash
    mimo_v2_flash muse_spark nemotron_h
    """.split()
)

LLAMA_CPP_ARCHITECTURES = frozenset(
    """
    AfmoeForCausalLM ApertusForCausalLM ArceeForCausalLM ArcticForCausalLM AudioFlamingo3ForConditionalGeneration
    BaiChuanForCausalLM BaichuanForCausalLM BailingMoeForCausalLM BailingMoeV2ForCausalLM BailingMoeV3ForCausalLM
    BailingMoeV3VLForConditionalGeneration BambaForCausalLM BertForMaskedLM BertForSequenceClassification BertModel
    BitNetForCausalLM BitnetForCausalLM BloomForCausalLM BloomModel CamembertModel ChameleonForCausalLM
    ChameleonForConditionalGeneration ChatGLMForConditionalGeneration ChatGLMModel CodeShellForCausalLM
    CogVLMForCausalLM Cohere2ForCausalLM Cohere2MoeForCausalLM CohereForCausalLM DFlash2DraftModel DFlashDraftModel
    DSparkDraftModel DSparkSpeculator DbrxForCausalLM DeciLMForCausalLM DeepseekForCausalLM DeepseekOCRForCausalLM
    DeepseekV2ForCausalLM DeepseekV32ForCausalLM DeepseekV3ForCausalLM DeepseekV4DSparkModel DeepseekV4ForCausalLM
    DistilBertForMaskedLM DistilBertForSequenceClassification DistilBertModel Dots1ForCausalLM Dots3NoteForCausalLM
    Dots3NoteForConditionalGeneration Dots3NoteTextForCausalLM DotsOCRForCausalLM DreamModel Eagle3DraftModel
    Eagle3LlamaForCausalLM Eagle3Speculator Ernie4_5ForCausalLM Ernie4_5_ForCausalLM Ernie4_5_MoeForCausalLM
    EuroBertModel Exaone4ForCausalLM Exaone4_5_ForConditionalGeneration ExaoneForCausalLM ExaoneMoEForCausalLM
    ExaoneMoeForCausalLM FalconForCausalLM FalconH1ForCausalLM FalconMambaForCausalLM GPT2LMHeadModel
    GPTBigCodeForCausalLM GPTNeoXForCausalLM GPTRefactForCausalLM Gemma2ForCausalLM Gemma3ForCausalLM
    Gemma3ForConditionalGeneration Gemma3TextModel Gemma3nForCausalLM Gemma3nForConditionalGeneration
    Gemma4AssistantForCausalLM Gemma4DSparkModel Gemma4ForCausalLM Gemma4ForConditionalGeneration
    Gemma4UnifiedAssistantForCausalLM Gemma4UnifiedForConditionalGeneration GemmaForCausalLM Glm4ForCausalLM
    Glm4MoeForCausalLM Glm4MoeLiteForCausalLM Glm4vForConditionalGeneration Glm4vMoeForConditionalGeneration
    Glm5NextForConditionalGeneration GlmForCausalLM GlmMoeDsaForCausalLM GlmOcrForConditionalGeneration
    GptOssForCausalLM GraniteForCausalLM GraniteMoeForCausalLM GraniteMoeHybridForCausalLM GraniteMoeSWAForCausalLM
    GraniteMoeSharedForCausalLM GraniteSWAForCausalLM GraniteSpeechForConditionalGeneration
    GraniteSpeechPlusForConditionalGeneration GraniteSwitchForCausalLM Grok1ForCausalLM GrokForCausalLM
    GroveMoeForCausalLM HYV3ForCausalLM HYV4ForCausalLM HrmTextForCausalLM HunYuanDenseV1ForCausalLM
    HunYuanMoEV1ForCausalLM HunYuanVLForConditionalGeneration IQuestCoderForCausalLM InternLM2ForCausalLM
    InternLM3ForCausalLM JAISLMHeadModel Jais2ForCausalLM JambaForCausalLM JanusForConditionalGeneration
    JinaBertForMaskedLM JinaBertModel JinaEmbeddingsV5Model KORMoForCausalLM KimiK25ForConditionalGeneration
    KimiK3ForConditionalGeneration KimiLinearForCausalLM KimiLinearModel KimiVLForConditionalGeneration
    LFM2ForCausalLM LLaDAMoEModel LLaDAMoEModelLM LLaDAModelLM LLaMAForCausalLM LagunaForCausalLM
    Lfm25AudioTokenizer Lfm2BidirectionalModel Lfm2DSparkDraftModel Lfm2ForCausalLM Lfm2Model Lfm2MoeForCausalLM
    LingDSparkModel Llama4ForCausalLM Llama4ForConditionalGeneration LlamaBidirectionalModel LlamaForCausalLM
    LlamaForCausalLMEagle3 LlamaModel LlavaForConditionalGeneration LlavaStableLMEpochForCausalLM MPTForCausalLM
    MT5ForConditionalGeneration MaincoderForCausalLM Mamba2ForCausalLM MambaForCausalLM MambaLMHeadModel
    MapleForCausalLM MellumForCausalLM MiMoV2FlashForCausalLM MiMoV2ForCausalLM MiniCPM3ForCausalLM
    MiniCPMForCausalLM MiniCPMV4_6ForConditionalGeneration MiniMaxM1ForCausalLM MiniMaxM2ForCausalLM
    MiniMaxM3SparseForCausalLM MiniMaxM3SparseForConditionalGeneration MiniMaxText01ForCausalLM
    Ministral3ForCausalLM Mistral3ForConditionalGeneration MistralForCausalLM MixtralForCausalLM
    ModernBertForMaskedLM ModernBertForSequenceClassification ModernBertModel MuseGlimmerAssistantModel
    MuseGlimmerForConditionalGeneration NanbeigeForCausalLM NemotronForCausalLM NemotronHForCausalLM
    NemotronHPuzzleForCausalLM NeoBERT NeoBERTForSequenceClassification NeoBERTLMHead NomicBertModel OLMoForCausalLM
    Olmo2ForCausalLM Olmo3ForCausalLM OlmoForCausalLM OlmoeForCausalLM OpenELMForCausalLM OrionForCausalLM
    PLMForCausalLM PLaMo2ForCausalLM PLaMo3ForCausalLM PaddleOCRVLForConditionalGeneration PanguEmbeddedForCausalLM
    Phi3ForCausalLM Phi4ForCausalLMV PhiForCausalLM PhiMoEForCausalLM Plamo2ForCausalLM Plamo3ForCausalLM
    PlamoForCausalLM PocketTTSModel QWenLMHeadModel Qwen2AudioForConditionalGeneration Qwen2ForCausalLM Qwen2Model
    Qwen2MoeForCausalLM Qwen2VLForConditionalGeneration Qwen2VLModel Qwen2_5OmniModel
    Qwen2_5_VLForConditionalGeneration Qwen3ASRForConditionalGeneration Qwen3DSparkModel Qwen3ForCausalLM Qwen3Model
    Qwen3MoeForCausalLM Qwen3NextForCausalLM Qwen3OmniMoeForConditionalGeneration Qwen3TTSForConditionalGeneration
    Qwen3VLForConditionalGeneration Qwen3VLMoeForConditionalGeneration Qwen3_5ForCausalLM
    Qwen3_5ForConditionalGeneration Qwen3_5MoeForCausalLM Qwen3_5MoeForConditionalGeneration Qwen4ExpForCausalLM
    Qwen4ExpForConditionalGeneration RND1 RWForCausalLM RWKV6Qwen2ForCausalLM RWKV7ForCausalLM
    RobertaForSequenceClassification RobertaModel RuGPT3XLForCausalLM Rwkv6ForCausalLM Rwkv7ForCausalLM
    RwkvHybridForCausalLM Sarashina2VisionForCausalLM SarvamMoEForCausalLM SeedOssForCausalLM
    SmallThinkerForCausalLM SmolLM3ForCausalLM SolarOpenForCausalLM Spark2_5ForCausalLM StableLMEpochForCausalLM
    StableLmForCausalLM Starcoder2ForCausalLM Step3p5ForCausalLM Step3p7ForConditionalGeneration
    StepVLForConditionalGeneration T5EncoderModel T5ForConditionalGeneration T5WithLMHeadModel TalkieForCausalLM
    UMT5ForConditionalGeneration UMT5Model UltravoxModel UnlimitedOCRForCausalLM VLlama3ForCausalLM
    VoxtralForConditionalGeneration WavTokenizerDec XLMRobertaForSequenceClassification XLMRobertaModel
    XverseForCausalLM YoutuForCausalLM YoutuVLForConditionalGeneration modeling_grove_moe.GroveMoeForCausalLM
    modeling_sarvam_moe.SarvamMoEForCausalLM
    """.split()
)

# Architectures whose experts vLLM keeps as three-dimensional weights, and takes fused LoRAs for.
VLLM_3D_EXPERTS = frozenset(
    {
        "GptOssForCausalLM",
        "InternS1ProForConditionalGeneration",
        "Qwen3OmniMoeForConditionalGeneration",
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        "Qwen3VLMoeForConditionalGeneration",
        "Qwen3_5MoeForConditionalGeneration",
    }
)
# Mixtures of experts that vLLM has no model of its own for, and runs through transformers' code.
VLLM_BY_TRANSFORMERS = frozenset({"FlexOlmoForCausalLM", "HunYuanMoEV1ForCausalLM"})
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
VLLM_DEFAULT_MAX_RANK = 16
