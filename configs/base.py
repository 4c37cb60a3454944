"""Every configuration key, with its unit and default. Other configs state only what differs.

    from configs.base import get_config as base_config

A key that is not declared here is an error, on the command line as in a file.

Dimension names: B batch (sequences), L sequence length (tokens), D `embed_dim`, F `ffn_dim`,
V `vocab_size`, S STEM layers, H query heads, K KV heads, Dh `head_dim`.
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    """Returns the base configuration; sizes are those of a very small model."""
    config = config_dict.ConfigDict()

    config.model = config_dict.ConfigDict()
    config.model.vocab_size = 4096  # V; must equal the tokenizer's
    config.model.embed_dim = 128  # D
    config.model.num_layers = 4
    config.model.num_heads = 4  # H
    config.model.num_kv_heads = 4  # K; divides num_heads
    config.model.head_dim = None  # Dh; None: embed_dim / num_heads
    config.model.ffn_dim = 384  # F, also the width of a STEM table
    # Layers that read rows of a table, see stem_site: "none", "third" (1, 4, 7, ...), "half" (1, 3,
    # 5, ...), "all_but_first" (the official default), "all", or indices such as "1,3" or (1, 3).
    config.model.stem_layers = config_dict.FieldReference("third", field_type=object)
    # Where a STEM layer's row U[t] stands. up (as published): silu(W_gate x) * U[t]; gate:
    # silu(U[t]) * W_up x, which begins near zero with rows of Xavier's std, see tables.init_std;
    # up_add: silu(W_gate x) * (W_up x + U[t]).
    config.model.stem_site = "up"
    # Layers with several FFNs, of which a hash of the token chooses one; as stem_layers, of which
    # none is among them.
    config.model.hash_moe_layers = config_dict.FieldReference("none", field_type=object)
    config.model.hash_moe_experts = 16  # of each such layer; its weights are so many times as many
    config.model.tie_embeddings = False  # the output head is the token embedding
    # Probability that training replaces a token's embedding by one learned vector, while its rows
    # stay: then what the model knows of a token is in the rows, where an edit finds it.
    config.model.token_embedding_dropout = 0.0
    config.model.norm_eps = 1e-5
    config.model.rope_theta = 10000.0
    # Contexts of rope_factor times rope_original_len tokens for a model trained on the latter:
    # none, llama3, yarn.
    config.model.rope_scaling = "none"
    config.model.rope_factor = 1.0
    config.model.rope_original_len = None  # tokens
    # Divides the std of the projections back into the residual stream: "disabled" (1),
    # "current_depth" (sqrt(2 (layer + 1))), "global_depth" (sqrt(2 (layers + 1))), "dim_ratio".
    config.model.init_std_factor = "disabled"
    config.model.init_base_std = None  # None: fan_in^-0.5 for every projection, as published
    # Of the backbone's copies that a step reads; parameters and their moments are float32.
    config.model.param_dtype = "float32"
    config.model.compute_dtype = "float32"  # matmuls and activations: float32 or bfloat16
    # Of the blocks' projections, on GPUs: none is compute_dtype; float8: e4m3, gradients in e5m2.
    config.model.matmul_dtype = None
    # auto: splash on TPUs, tokamax on GPUs; chunked (of queries) there for what those do not take;
    # xla (all scores at once) on CPUs. cudnn: of GPUs, for rows of one document each.
    config.model.attention = "auto"
    # What a layer keeps for its backward pass beside its input; the rest is computed again. none:
    # all of it; full: nothing; attention: the results of attention; dots: those of projections;
    # offload: both, in the hosts' memory.
    config.model.remat = "none"
    # Compile repeating groups of layers once and loop over them: minutes become seconds, for a
    # copy of the parameters in each step.
    config.model.scan_layers = False

    config.tables = config_dict.ConfigDict()
    # deferred_adamw: dense AdamW's meaning at the cost of the rows in a batch; dense_adamw: every
    # row moves every step, as published; lazy_adamw: only rows in a batch move, another optimizer.
    config.tables.optimizer = "deferred_adamw"
    # Of the rows and of AdamW's moments: float32, or bfloat16, to which updates are rounded at
    # random, up as often as they are nearer there.
    config.tables.row_format = "float32"
    # What an optimizer keeps of a row: adamw (two numbers for each of its own), or rowwise (one for
    # each layer's vector, the mean of its squared gradients). Bytes of a number of rows that are
    # 160 wide: 12.03; bfloat16 6.03; bfloat16 and rowwise 2.05.
    config.tables.moments = "adamw"
    config.tables.lr_multiplier = 1.0  # times optimizer.learning_rate
    config.tables.weight_decay = None  # None: optimizer.weight_decay
    config.tables.clip_norm = 1.0  # global norm over all tables, apart from the backbone's
    config.tables.init_std = None  # None: Xavier over [V, F], sqrt(2 / (V + F))
    # Mesh axes that shard the rows, of data, fsdp, context; along the others lie copies.
    config.tables.vocab_axes = ("data", "fsdp")
    # Rows per owner and exchange round; None: 1.25 x the even share, at most 256 MiB a round.
    config.tables.capacity = None
    config.tables.pad_multiple = 256  # rows are padded to a multiple; shards must divide it
    # Rows (with optimizer state) that the devices hold, over all shards; the others lie in host
    # memory and come when a batch needs them. None: all. Shards must divide it.
    config.tables.resident_rows = None
    # Rows of those that host memory holds, over all shards; the others lie on disk, in the folder
    # `disk` of each process's own machine. None: all.
    config.tables.host_rows = None
    config.tables.disk = None
    config.tables.prefetch = 2  # batches that the loop looks ahead; 0: it waits for each one's rows
    config.tables.cache_policy = "lfu"  # which rows stay: lfu (with aging) or lru
    # Words whose rows alone are trained, as they stand in a sentence ("Spain,New Zealand"), or
    # token ids (886,12); rows of other tokens keep their bits. None: all.
    config.tables.trained_words = config_dict.FieldReference(None, field_type=object)

    # Memories beside STEM's, each with a table and an optimizer of its own (docs/memories.md). Of
    # each: the layers that read it, as model.stem_layers; and what is its own, where None is the
    # value of tables.*, of betas that of optimizer.*. resident_rows, host_rows None: all.
    own = {
        "lr_multiplier": None,
        "weight_decay": None,
        "beta1": None,
        "beta2": None,
        "clip_norm": None,
        "init_std": None,  # None: value D^-0.5 (nanochat), per_layer width^-0.5, ngram 0.02
        "row_format": None,
        "moments": None,
        "resident_rows": None,
        "host_rows": None,
    }

    # Value embeddings: v += 3 sigmoid(W x)_head * row of the token.
    config.value = config_dict.ConfigDict(own)
    config.value.layers = config_dict.FieldReference("none", field_type=object)

    # Per-layer embeddings: behind each FFN the token's row gates the residual stream (Gemma).
    config.per_layer = config_dict.ConfigDict(own)
    config.per_layer.layers = config_dict.FieldReference("none", field_type=object)
    config.per_layer.width = 256  # P, of a row

    # Hashed n-grams. reader: engram, before attention; value, as value embeddings; embedding, once
    # before layer 0, whose layers are "0".
    config.ngram = config_dict.ConfigDict(own)
    config.ngram.layers = config_dict.FieldReference("none", field_type=object)
    config.ngram.reader = "engram"
    config.ngram.max_order = 3  # N: n-grams of 2 to N tokens
    config.ngram.heads = 8  # H, hashes of each n-gram
    config.ngram.keys_per_head = 2**20  # the primes of the hashes are the next ones; at least V
    config.ngram.width = 1024  # of all rows that a layer reads of a token; (N - 1) H divides it
    config.ngram.seed = 0  # of the hashes' multipliers
    config.ngram.eos_id = None  # n-grams end at this token; None: that of the run's tokenizer

    # LoRA: the backbone stays as it is, and adapters of low rank beside its projections train in
    # its place, in a run that begins with another (train.init_from). Saved in PEFT's format by
    # stem_jax.export --format=peft, merged by --format=hf.
    config.lora = config_dict.ConfigDict()
    config.lora.rank = 0  # r; 0: none
    config.lora.alpha = 16.0  # what an adapter adds is multiplied by alpha / r
    # Projections with an adapter, in all layers that have them.
    config.lora.targets = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )

    config.data = config_dict.ConfigDict()
    # Comma-separated name=weight: built-in corpora (pydoc, stdlib, facts, facts_changed,
    # facts_unchanged; synthetic: needles, roll_calls, name_pairs), prepared token stores (folders),
    # or text files ("data/*.jsonl.zst").
    config.data.sources = "pydoc"
    config.data.tokenizer = "sentencepiece"  # sentencepiece, hf, bytes
    config.data.tokenizer_path = None  # or hf://ORG/NAME; None: train sentencepiece, V tokens
    # Of text: the key of a JSON object, or the column of a Parquet file, that holds it.
    config.data.text_field = "text"
    # auto (by name and content), text (a file is a document), jsonl (an object on each line), json
    # (an array of objects), parquet.
    config.data.format = "auto"
    # How documents become rows: cut (wherever a row ends) or whole (each in one row, which padding
    # fills; what is longer than a row is cut there).
    config.data.packing = "cut"
    config.data.validation_fraction = 0.02  # of the documents, for text prepared here
    config.data.folder = None  # where text is prepared; None: <workdir>/data

    config.mesh = config_dict.ConfigDict()
    config.mesh.data = -1  # devices; -1: all that the other axes leave
    config.mesh.fsdp = 1
    # Devices over which the positions of a sequence lie: each attends from its own to those of all.
    # Twice their number divides train.seq_len.
    config.mesh.context = 1
    config.mesh.tensor = 1
    # A parameter larger than this must not be replicated over fsdp or tensor when those axes exist.
    config.mesh.max_replicated_mib = 16.0

    config.optimizer = config_dict.ConfigDict()
    # Of the backbone: adamw, or muon for the blocks' matrices with adamw for embeddings, head and
    # norms, at the same learning rate. Rows have their own, see tables.optimizer.
    config.optimizer.name = "adamw"
    # all, tables or backbone; what is not named stays as it is, bit for bit.
    config.optimizer.train = "all"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "cosine"  # constant, linear, inv_sqrt, cosine, wsd
    config.optimizer.schedule_steps = None  # length of the schedule; None: train.steps
    config.optimizer.warmup_steps = 20
    config.optimizer.min_lr_ratio = 0.1
    config.optimizer.decay_fraction = 0.1  # wsd: share of the steps that decay
    config.optimizer.cycle_length = 1.0  # cosine and wsd: share of the steps in one cycle
    config.optimizer.cosine_theta = 1.0  # cosine: exponent of the progress
    config.optimizer.inv_sqrt_exponent = 0.5
    config.optimizer.beta1 = 0.9
    config.optimizer.beta2 = 0.95
    config.optimizer.epsilon = 1e-8
    config.optimizer.weight_decay = 0.1
    config.optimizer.decay_mask = "all"  # all (as published) or matrices (not norms)
    config.optimizer.clip_norm = 1.0  # global norm of the backbone's gradients

    config.train = config_dict.ConfigDict()
    # A work folder whose newest checkpoint a new run begins with: its parameters, tables and
    # tokenizer, with fresh optimizer state at step 0. None: random parameters.
    config.train.init_from = None
    # A work folder whose newest checkpoint a new run goes on from: parameters, tables, all moments,
    # and the count of steps, which train.steps includes and the schedule goes on by. The text
    # begins anew. May differ: batch, seq_len and rotary scaling, data and seed, learning rates,
    # clip norms, z_loss, dtypes, and whatever a resume may change. None: not.
    config.train.continue_from = None
    config.train.steps = 100
    config.train.global_batch_size = 16  # sequences per step over all devices
    config.train.micro_batches = 1  # gradient accumulation: slices of the global batch
    config.train.seq_len = 256  # tokens
    # Of parameters, order and dropout; of text prepared here also which documents are held out.
    config.train.seed = 0
    # By what, beside the seed, the backbone's first parameters are drawn. count: how many were
    # before; name: each its own, so that parameters of one name and shape begin with the same bits
    # in every model.
    config.train.init = "count"
    config.train.z_loss = 0.0  # times mean(logsumexp^2)
    # Positions of each sequence of a device whose logits exist at a time. None: 2048 tokens of the
    # device, fewer where their float32 logits would take more than 1 GiB.
    config.train.loss_chunk = None
    config.train.max_bad_steps = 5  # non-finite steps in a row before the run stops
    config.train.log_every = 10  # steps
    # First and last step of a trace, such as "20-22", in the run's folder `profile`; or "none".
    config.train.profile_steps = "none"
    # Seconds without a step, a validation batch or a save after which a process gives up with the
    # stacks of its threads and exit status 75; compiling counts. None: it waits for ever.
    config.train.step_timeout = 1800.0
    # Seconds between uploads of metrics, logs and other files of a run in a bucket, which come with
    # every save and at the end, too. None: then alone.
    config.train.upload_every = 60.0
    # Folder of compiled programs, for fast restarts: shared by all hosts. None: compile anew.
    config.train.compilation_cache = None
    config.train.sample_prompt = "The"  # completed at the end of training; empty: no sample
    config.train.sample_tokens = 64

    config.eval = config_dict.ConfigDict()
    config.eval.every = 100  # steps; 0: only at the end
    config.eval.max_batches = None  # None: every held-out token
    config.eval.baselines = True  # unigram and xz on the held-out documents

    config.checkpoint = config_dict.ConfigDict()
    config.checkpoint.every = 100  # steps; 0: only at the end
    config.checkpoint.keep = 2  # newest checkpoints kept, beside the best by validation loss
    # Whether checksums of all files of a checkpoint are compared before it is read.
    config.checkpoint.verify = True
    # Of so many saves of a table one has all rows, at least; others have those that changed since
    # the save before, and need that. 0 or 1: every save has all rows.
    config.checkpoint.full_every = 1

    # Where the run is shown beside its folder, by process 0 (docs/training.md).
    config.tracking = config_dict.ConfigDict()
    # tensorboard, wandb, mlflow: each that is named; None: none of them.
    config.tracking.trackers = config_dict.FieldReference(("tensorboard",), field_type=object)
    config.tracking.project = "stem_jax"  # of W&B; the experiment of MLflow
    config.tracking.name = None  # of the run there; None: that of its folder
    config.tracking.offline = False  # W&B: files in the run's folder, for `wandb sync`
    config.tracking.mlflow_uri = None  # http://HOST:PORT; None: MLFLOW_TRACKING_URI
    # Seconds that the end of a run waits, at most, until all is reported.
    config.tracking.timeout = 30.0
    return config
