"""Bad command lines and YAML files, each with the exact line that its user gets."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BadConfig:
    """`script` with `argv` and, where given, `yaml` as its --config.

    {model}, {data} and {tmp} are filled in, {config} is the YAML file's path; a message goes on after a final …
    """

    script: str
    argv: str
    message: str
    yaml: bytes | None = None


HERE = "--model_name_or_path {model} --dataset_name {data} --output_dir {tmp}/out"
FROM = "--config {config}: "
EVALUATE = "--reference_model {model} --dpo_model {model} --dataset_name {data} --output_file {tmp}/out/results.json"
COMPARE = "--base_model {model} --finetuned_model {model} --dataset_name {data} --output_dir {tmp}/out"
JUDGE = "--judge_model j --dataset_name {data} --run_dir {tmp}/out"
CHECK = "--dataset_name {data} --report {tmp}/out/report.json"
SECRET = (
    "holds a key or password, which would show in files and process lists; "
    "put it into the environment: HF_TOKEN, OPENAI_API_KEY or WANDB_API_KEY"
)


def dpo(options: str, message: str) -> BadConfig:
    return BadConfig("dpo", f"{HERE} {options}", message)


def sft(options: str, message: str) -> BadConfig:
    return BadConfig("sft", f"{HERE} {options}", message)


def yaml(text: bytes, message: str) -> BadConfig:
    return BadConfig("dpo", HERE, message, text)


BAD_CONFIGS: dict[str, BadConfig] = {
    # What is missing, unknown or cannot be read
    "no model": BadConfig(
        "dpo",
        "",
        "--model_name_or_path is required: model folder or Hub name; an adapter's folder goes on training it; "
        "--dataset_name is required: Hub name; …",
    ),
    "no data": BadConfig(
        "sft", "--model_name_or_path {model}", "--dataset_name is required: Hub name; or a .json, .jsonl, .csv …"
    ),
    "no output folder": BadConfig(
        "dpo",
        "--model_name_or_path {model} --dataset_name {data}",
        "--output_dir is required: folder for checkpoints, logs and the trained model",
    ),
    "a word that is no option": dpo(
        "beta 0.2",
        "command line: unexpected argument beta (options start with --); "
        "command line: unexpected argument 0.2 (options start with --)",
    ),
    "an abbreviation": dpo("--learning 1", "command line: unknown option learning; did you mean learning_rate?"),
    "a typo": dpo("--lora_rank 8", "command line: unknown option lora_rank; did you mean lora_r?"),
    "an option of TRL's": dpo(
        "--push_to_hub",
        "command line: push_to_hub is not an option here; upload the finished model with scripts/upload_hf.py",
    ),
    "a negative number with an exponent": dpo(
        "--learning_rate -1e-5", "--learning_rate must not be negative, got -1e-05"
    ),
    "an option without its value": dpo("--beta", "argument --beta: expected one argument (see --help)"),
    "a key on the command line": dpo(
        "--openai_api_key sk-0123456789abcdefghijklmnop",
        "command line: unknown option openai_api_key; keys are read from the environment: HF_TOKEN, OPENAI_API_KEY or "
        "WANDB_API_KEY",
    ),
    "a typo in YAML": yaml(b"beta: 0.1\nbata: 0.2\n", FROM + "unknown option bata; did you mean beta?"),
    "an option of TRL's in YAML": yaml(
        b"push_to_hub: true\n",
        FROM + "push_to_hub is not an option here; upload the finished model with scripts/upload_hf.py",
    ),
    "an option of another script's": BadConfig(
        "sft",
        HERE,
        FROM + "beta is not an option here; it is one of scripts/dpo.py",
        b"beta: 0.1\n",
    ),
    "an option twice in YAML": yaml(b"beta: 0.1\nbeta: 0.2\n", FROM + "option beta appears twice"),
    "a list for YAML": yaml(b"- beta\n", FROM + "must be a mapping of options, not a list"),
    "a text for YAML": yaml(b"beta\n", FROM + "must be a mapping of options, not a str"),
    "a list without its end": yaml(b"loss_type: [sigmoid\n", FROM + "not YAML: while parsing a flow sequence …"),
    "tabs": yaml(b"beta:\t0.1\n\tseed: 1\n", FROM + "not YAML: while scanning …"),
    "an object in YAML": yaml(
        b"beta: !!python/object/apply:os.system ['true']\n", FROM + "not YAML: could not determine a constructor …"
    ),
    "Latin-1 in YAML": yaml(b"run_name: gr\xfcn\n", FROM + "cannot be read: 'utf-8' codec can't decode byte 0xfc …"),
    "options below options": yaml(b"dpo:\n  beta: 0.1\n", FROM + "unknown option dpo…"),
    "no such YAML": dpo(
        "--config {tmp}/none.yaml", "--config {tmp}/none.yaml: cannot be read: No such file or directory"
    ),
    "a folder for YAML": dpo("--config {tmp}/out", "--config {tmp}/out: cannot be read: Is a directory"),
    # Values of the wrong kind
    "no number": dpo("--beta high", "command line: beta must be a number, not 'high'"),
    "a null for a number": yaml(b"beta:\n", FROM + "beta needs a value"),
    "a list for a number": yaml(b"beta: [0.1]\n", FROM + "beta must be a number, not ['0.1']"),
    "NaN": dpo("--learning_rate nan", "command line: learning_rate must be a number, not 'nan'"),
    "infinity": yaml(b"max_grad_norm: .inf\n", FROM + "max_grad_norm must be a number, not '.inf'"),
    "half a step": dpo("--max_steps 1.5", "command line: max_steps must be a whole number, not '1.5'"),
    "a boolean for a number": yaml(b"max_steps: true\n", FROM + "max_steps must be a whole number, not 'true'"),
    "neither true nor false": dpo("--use_peft maybe", "command line: use_peft must be true or false, not 'maybe'"),
    "a mapping for a name": yaml(b"dataset_name: {a: b}\n", FROM + "dataset_name must be text, not {{'a': 'b'}}"),
    "an unknown loss": dpo("--loss_type dpo", "--loss_type dpo: no such loss (did you mean ipo?); …"),
    "an unknown schedule": dpo("--lr_scheduler_type cosin", "command line: lr_scheduler_type must be one of linear, …"),
    "an unknown format": dpo("--data_format csv", "command line: data_format must be one of hh, prompt_pair, …"),
    # Out of range
    "β of 0": dpo("--beta 0", "--beta must be above 0, not 0.0"),
    "too much smoothing": dpo("--label_smoothing 0.5", "--label_smoothing must be at least 0 and below 0.5, not 0.5"),
    "no steps": dpo("--max_steps 0", "--max_steps must be at least 1, or -1 for --num_train_epochs, not 0"),
    "no epochs": dpo("--num_train_epochs 0", "--num_train_epochs must be above 0, not 0.0"),
    "an empty batch": dpo("--per_device_train_batch_size 0", "--per_device_train_batch_size must be at least 1, not 0"),
    "a negative learning rate": dpo("--learning_rate -0.1", "--learning_rate must not be negative, got -0.1"),
    "all prompts held out": dpo("--val_ratio 1", "--val_ratio must be at least 0 and below 1, not 1.0"),
    "a prompt as long as the sequence": dpo(
        "--max_length 64 --max_prompt_length 64",
        "--max_prompt_length must be below --max_length 64, not 64",
    ),
    "a negative number of bad rows": dpo("--max_bad_rows -1", "--max_bad_rows must not be negative, got -1"),
    "a tail of everything": dpo("--tail_delta 1", "--tail_delta must be above 0 and below 1, not 1.0"),
    "β outside of its range": dpo(
        "--beta 2 --beta_control risk", "--beta 2.0 is outside of --beta_min 0.01 to --beta_max 1.0"
    ),
    # Options that do nothing, or contradict each other
    "smoothing of a loss that has none": dpo(
        "--loss_type ipo --label_smoothing 0.1", "--label_smoothing has no effect with --loss_type ipo; …"
    ),
    "weights for another number of losses": dpo(
        "--loss_type sigmoid sft --loss_weights 1", "--loss_weights has 1 values for 2 --loss_type"
    ),
    "exo without smoothing": dpo(
        "--loss_type exo_pair", "--loss_type exo_pair needs --label_smoothing above 0 (its paper takes 1e-3)"
    ),
    "a divergence's coefficient alone": dpo(
        "--f_alpha_divergence_coef 0.7",
        "--f_alpha_divergence_coef has no effect without --f_divergence_type alpha_divergence",
    ),
    "a temperature of another loss": dpo(
        "--discopop_tau 0.1", "--discopop_tau has no effect without --loss_type discopop"
    ),
    "LoRA's rank without LoRA": dpo("--lora_r 8", "--lora_r has no effect without --use_peft…"),
    "4 bits without LoRA": dpo(
        "--load_in_4bit",
        "--load_in_4bit needs --use_peft or an adapter: 4-bit weights cannot be trained themselves",
    ),
    "two precisions": dpo(
        "--bf16 --fp16",
        "--bf16 and --fp16 exclude each other; --fp16 needs an accelerator: use --bf16, or neither, on the CPU",
    ),
    "fp16 on the CPU": dpo("--fp16", "--fp16 needs an accelerator: use --bf16, or neither, on the CPU"),
    "evaluation steps without evaluation": dpo(
        "--eval_steps 5", "--eval_steps and --eval_strategy steps need each other"
    ),
    "β's range without control": dpo("--beta_min 0.02", "--beta_min has no effect without --beta_control risk"),
    "trackers and none": dpo("--report_to none wandb", "--report_to none excludes other trackers"),
    "a mirror in the mirrored": dpo(
        "--mount_dir {tmp}/out/mirror",
        "--mount_dir {tmp}/out/mirror is inside of --output_dir, which would mirror the mirror",
    ),
    "one column for both answers": dpo(
        "--chosen_key a --rejected_key a", "--chosen_key and --rejected_key both name a: no pair would prefer anything"
    ),
    "a revision of a local file": dpo(
        "--dataset_revision main", "--dataset_revision has no effect: {data} is here, not on the Hub"
    ),
    "no such split": dpo(
        "--dataset_train_split valid", "--dataset_name {data}: no split valid (has train, test); see --val_ratio"
    ),
    # Models
    "a folder that is no model": BadConfig(
        "dpo",
        HERE.replace("{model}", "{tmp}/not_a_model"),
        "{tmp}/not_a_model: not a model folder: it has no tokenizer_config.json",
    ),
    "a file for a model": sft("--model_name_or_path {tmp}/file", "{tmp}/file: no such model folder"),
    "a model that is gone": sft("--model_name_or_path {tmp}/gone", "{tmp}/gone: no such model folder"),
    "a reference that is gone": dpo("--reference_model {tmp}/gone", "{tmp}/gone: no such model folder"),
    "a pickle for a model": dpo(
        "--model_name_or_path {tmp}/pickle",
        "{tmp}/pickle: pytorch_model.bin is a pickle, which can run code when it is loaded; "
        "convert it to safetensors first: SECURITY.md says how",
    ),
    "a merge of a pickle": BadConfig(
        "merge_lora",
        "--adapter {tmp}/pickle --output_dir {tmp}/merged",
        "{tmp}/pickle: pytorch_model.bin is a pickle, which can run code when it is loaded; "
        "convert it to safetensors first: SECURITY.md says how",
    ),
    "an upload of a file elsewhere": BadConfig(
        "upload_hf",
        "--repo_id me/model --folder {tmp}/with_link --dry_run",
        "--folder {tmp}/with_link: notes.txt is a link to /etc/passwd; copy it here if it is to go",
    ),
    "a pickle for an adapter": BadConfig(
        "merge_lora",
        "--adapter {tmp}/pickled_adapter --output_dir {tmp}/merged",
        "{tmp}/pickled_adapter: adapter_model.bin is a pickle, which can run code when it is loaded; "
        "convert it to safetensors first: SECURITY.md says how",
    ),
    "weights elsewhere": dpo(
        "--model_name_or_path {tmp}/elsewhere",
        "{tmp}/elsewhere/model.safetensors.index.json: names '../../secret.bin', "
        "which is no safetensors file beside it",
    ),
    "code in a model's repository": sft(
        "--model_name_or_path {tmp}/with_code", "{tmp}/with_code: cannot be loaded as a model: …"
    ),
    "a chat template that looks around": sft(
        "--model_name_or_path {tmp}/nosy_template",
        "{tmp}/nosy_template: its chat template cannot render a user's turn: access to attribute '__class__' of 'str' "
        "object is unsafe.",
    ),
    "output below a file": BadConfig(
        "dpo", HERE.replace("{tmp}/out", "{tmp}/file/out"), "{tmp}/file/out/run.json cannot be read …"
    ),
    # Other scripts
    "a merge of no adapter": BadConfig(
        "merge_lora",
        "--adapter {tmp}/not_a_model --output_dir {tmp}/out",
        "--adapter {tmp}/not_a_model: neither an adapter's folder nor a model's",
    ),
    "nothing to evaluate": BadConfig(
        "evaluate",
        "--reference_model {model} --dataset_name {data}",
        "nothing to evaluate: give --sft_model, --dpo_model or both",
    ),
    "an evaluation of no model": BadConfig(
        "evaluate",
        EVALUATE + " --dpo_model {tmp}/not_a_model",
        "{tmp}/not_a_model: not a model folder: it has no config.json",
    ),
    "results that are no JSON": BadConfig(
        "evaluate", EVALUATE + " --output_file {tmp}/out/r.txt", "--output_file {tmp}/out/r.txt: must end in .json"
    ),
    "a comparison with no model": BadConfig(
        "compare", COMPARE + " --base_model {tmp}/gone --finetuned_model {tmp}/gone", "{tmp}/gone: no such model folder"
    ),
    "a comparison with itself": BadConfig(
        "compare", COMPARE + " --policy base", "--policy and --against are both base: nothing to compare"
    ),
    "no temperature": BadConfig(
        "generate",
        "--models dpo={model} --output_dir {tmp}/out --dataset_name {data} --temperature 0",
        "--temperature must be above 0, not 0.0; use --greedy for none",
    ),
    "a label that leaves the folder": BadConfig(
        "generate", "--models ../dpo={model} --output_dir {tmp}/out --dataset_name {data}", "--models …"
    ),
    "no answers to judge": BadConfig(
        "judge",
        "--judge_model j --dataset_name {data}",
        "--run_dir, or --generations_a and --generations_b, is required: the answers to judge",
    ),
    "a limit without prices": BadConfig(
        "judge",
        JUDGE + " --max_cost 1",
        "--max_cost needs --price_in and --price_out: the server does not tell its prices",
    ),
    "a server that is no address": BadConfig(
        "judge",
        JUDGE + " --base_url localhost:8000",
        "--base_url localhost:8000: must start with http:// or https:// and name a host",
    ),
    "no report to write": BadConfig("report", "--run_dir {tmp}/gone", "--run_dir {tmp}/gone: …"),
    "an upload to nowhere": BadConfig(
        "upload_hf",
        "--repo_id ../x --folder {model}",
        "--repo_id ../x: must be owner/name, of letters, digits, '-', '_' and '.'",
    ),
    "a check of nothing": BadConfig(
        "check_data", CHECK + " --dataset_name {tmp}/gone.csv", "--dataset_name {tmp}/gone.csv: no such file or folder"
    ),
    # Keys where they would be seen
    "a password in an address": BadConfig(
        "judge", JUDGE + " --base_url http://user:secret-word@host/v1", "command line: base_url " + SECRET
    ),
    "a password in the data's address": dpo(
        "--dataset_name https://me:secret-word@host/pairs.jsonl", "command line: dataset_name " + SECRET
    ),
    "a token in YAML": yaml(b"run_name: hf_" + b"a1" * 17 + b"\n", FROM + "run_name " + SECRET),
    "a token in a list": yaml(b"report_to: [sk-" + b"a1" * 17 + b"]\n", FROM + "report_to …"),
}
