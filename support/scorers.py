"""
Scores of a picture: HPSv2 and other CLIPs, T2I-CompBench's questions to BLIP, and the toy's judge (Table 4).

A scorer finds and checks its files when created; `load` reads its weights onto a device.
`columns(group)` names its scores of a group of prompts, and `scorer(image, prompt, group)` gives them, nan
where one does not apply. The networks are those of transformers, imported when one is loaded.
"""

import math
import re
import sys
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError

from model import read_config, read_weights
from support.files import error_summary, local_folder
from toy import shapes

CLIPS = {
    "hpsv2": "adams-story/HPSv2-hf",                             # xswu/HPSv2 as a CLIPModel
    "pickscore": "yuvalkirstain/PickScore_v1",
    "clip": "openai/clip-vit-large-patch14"}
COMPBENCH = {"clip": "openai/clip-vit-base-patch32", "blip": "Salesforce/blip-vqa-base"}  # the benchmark's own
SCORERS = (*CLIPS, "compbench", "judge")
KINDS = {"clip": "CLIPModel", "blip": "BlipForQuestionAnswering"}  # by the model_type in config.json


def find_network(source: str, kind: str) -> tuple[Path, Path]:
    """
    The folders of a network of transformers, `kind` "clip" or "blip", and of its processor.

    A CLIP without a processor, as conversions are, gets OpenAI's, which is the same for all. Raises
    FileNotFoundError or ValueError, one line that says what to do, for other networks and for mere pickles.
    """
    folder = local_folder(source, ("scorer",))
    model_type = read_config(folder, lambda config: config["model_type"])
    if model_type != kind:
        raise ValueError(f"{source} is a {model_type}, not a {kind}; give a {KINDS[kind]} as --scorer")
    if not any(folder.glob("model*.safetensors*")):
        raise FileNotFoundError(
            f"{source} has no model.safetensors, and a pickle (.bin) is not opened; convert it, or look on "
            f"its page for a pull request that did (hf download ... --revision refs/pr/N); give the folder")
    own = any((folder / f"{name}_config.json").exists() for name in ("preprocessor", "processor"))
    if own or kind != "clip":
        return folder, folder
    return folder, local_folder(COMPBENCH["clip"], ("scorer",), weights=False)


def load_network(folder: Path, processor_folder: Path, kind: str,
                 device: str) -> tuple[torch.nn.Module, object]:
    """A network in float32 and its processor; raises as `find_network`, also if weights are missing."""
    import transformers  # slow to import, and seldom needed
    transformers.logging.set_verbosity_error()                   # no warnings about other packages
    transformers.logging.disable_progress_bar()

    weights = read_weights(folder, "model", torch.float32)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        network, report = getattr(transformers, KINDS[kind]).from_pretrained(
            None, config=config, state_dict=weights, dtype=torch.float32, output_loading_info=True)
        processor = transformers.AutoProcessor.from_pretrained(processor_folder, local_files_only=True)
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder} does not load as a {KINDS[kind]}: {error_summary(error)}") from None
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} tensors of a {KINDS[kind]}, such as {missing[0]}")
    return network.eval().to(device), processor


class CLIPScorer:
    """
    100 x the cosine of a picture and its prompt, by a CLIPModel: its `source` is a hub id or a folder.

    HPSv2 (Wu et al., arXiv 2306.09341) and PickScore (arXiv 2305.01569) were trained on what people prefer.
    """

    digits = 2

    def __init__(self, source: str, prompts: list[str]):
        self.folders, self.prompts = find_network(source, "clip"), prompts

    def columns(self, group: str) -> tuple[str, ...]:
        return (group,)

    def load(self, device: str):
        self.network, self.processor = load_network(*self.folders, "clip", device)
        self.length = self.network.config.text_config.max_position_embeddings
        tokens = [self.processor.tokenizer(prompt)["input_ids"] for prompt in self.prompts]
        count = sum(len(ids) > self.length for ids in tokens)
        if count:
            print(f"warning: {count} prompts are longer than the {self.length} tokens that the scorer reads",
                  file=sys.stderr)

    @torch.inference_mode()
    def __call__(self, image: Image.Image, prompt: str, group: str) -> list[float]:
        inputs = self.processor(images=image, text=prompt, truncation=True, max_length=self.length,
                                return_tensors="pt").to(self.network.device)
        output = self.network(**inputs)
        return [100 * (output.image_embeds * output.text_embeds).sum().item()]


class CompBench:
    """
    T2I-CompBench (Huang et al., arXiv 2307.06350), by category, which is the group's name.

    Attributes: BLIP is asked "PHRASE?" for each noun phrase, and the probabilities of "yes" rather than "no"
    are multiplied. Unlike in the benchmark, phrases are those of `noun_phrases` and not spaCy's, and a
    question begins with the tokenizer's first token and not [ENC]. Non-spatial: CLIP's cosine. Others need
    UniDet.
    """

    digits = 4
    UNIDET = ("spatial", "3d_spatial", "numeracy", "complex")    # categories that need it

    def __init__(self, groups: dict[str, list[str]]):
        non_spatial, attributes = groups.get("non_spatial"), groups.keys() - {"non_spatial", *self.UNIDET}
        self.clip = CLIPScorer(COMPBENCH["clip"], non_spatial) if non_spatial else None
        self.folders = find_network(COMPBENCH["blip"], "blip") if attributes else None

    def columns(self, group: str) -> tuple[str, ...]:
        return () if group in self.UNIDET else (group,)

    def load(self, device: str):
        if self.clip:
            self.clip.load(device)
        if self.folders:
            self.network, self.processor = load_network(*self.folders, "blip", device)

    def __call__(self, image: Image.Image, prompt: str, group: str) -> list[float]:
        if group == "non_spatial":
            return [self.clip(image, prompt, group)[0] / 100]
        questions = [f"{phrase}?" for phrase in noun_phrases(prompt)]
        return [math.prod(self.answer(image, questions))] if questions else [math.nan]

    @torch.inference_mode()
    def answer(self, image: Image.Image, questions: list[str]) -> list[float]:
        """BLIP's probability of "yes" rather than "no" to each question; one by one, as padding counts."""
        network, tokenizer, answers = self.network, self.processor.tokenizer, []
        pixels = self.processor.image_processor(image, return_tensors="pt")["pixel_values"].to(network.device)
        seen = network.vision_model(pixels).last_hidden_state    # (1, T, D)
        start = torch.full((1, 1), network.decoder_start_token_id, device=network.device)
        for question in questions:
            ids = tokenizer(question, return_tensors="pt")["input_ids"].to(network.device)  # (1, L)
            asked = network.text_encoder(ids, encoder_hidden_states=seen).last_hidden_state  # (1, L, D)
            logits = network.text_decoder(start, encoder_hidden_states=asked).logits[0, 0]  # (words,)
            answers.append(logits[tokenizer.convert_tokens_to_ids(["yes", "no"])].softmax(dim=0)[0].item())
        return answers


class Judge:
    """The toy's judge: colour, shape and spatial, each 0 or 1. Raises ValueError for other prompts."""

    digits = 3

    def __init__(self, captions: list[str]):
        for caption in captions:
            shapes.parse(caption)

    def columns(self, group: str) -> tuple[str, ...]:
        return shapes.SCORES

    def load(self, device: str):
        """It reads pixels, and has no network."""

    def __call__(self, image: Image.Image, caption: str, group: str) -> list[float]:
        return [math.nan if score is None else score for score in shapes.judge(image, caption).values()]


def find_scorer(name: str, groups: dict[str, list[str]]) -> CLIPScorer | CompBench | Judge:
    """The scorer of this name, or of a CLIPModel's hub id or folder, for these prompts; raises as they do."""
    prompts = sum(groups.values(), [])
    if name == "judge":
        return Judge(prompts)
    if name == "compbench":
        return CompBench(groups)
    if name not in SCORERS and "/" not in name and not Path(name).is_dir():
        raise ValueError(f"--scorer {name} is neither {', '.join(SCORERS)}, nor a hub id or folder")
    return CLIPScorer(CLIPS.get(name, name), prompts)


# ------------------------------------------------------------------------------------------------------------
# Noun phrases


DETERMINERS = set("a an the its his her their this these those one two three four some many".split())
BREAKS = (  # words between phrases; those of several words first
    "in front of|on top of|next to|side by side|and|or|with|of|in|on|at|by|near|to|from|for|into|onto|over|"
    "under|above|below|beside|behind|between|against|through|around|across|inside|outside|along|as|while|"
    "that|which|who|where|has|have|had")
VERBS = set(  # of the benchmark's sentences; words that name things too, such as "slice", are left out
    "is are was were be been hold holds held sit sits sat stand stands stood hang hangs hung rest rests lie "
    "lies serve serves provide provides provided release bake boil illuminate attract keep keeps kept "
    "decorate jot write made create created led flowed floated propelled sparkled dominated attracted "
    "fascinated controlled reads sitting standing parked placed attached mounted stacked arranged waving".split())
COLOURS = "black|white|red|green|blue|yellow|orange|purple|pink|brown|gray|grey|gold|silver|tan|beige"


def noun_phrases(prompt: str) -> list[str]:
    """
    The noun phrases of a sentence such as T2I-CompBench's, in its order.

    A phrase begins at a determiner, or after one of BREAKS or a comma, and ends before the next, or at one of
    VERBS; what follows a verb up to there is no phrase. Two colours that "and" joins are one attribute. This
    knows no grammar: a verb that is not listed stays with the noun before it, unless a determiner follows; an
    object without a determiner is lost after a verb; a comma between adjectives separates them; and any word
    that is left over passes for a noun.
    """
    text = re.sub(rf"\b({COLOURS}) and (?=(?:{COLOURS})\b)", r"\1_and_", prompt, flags=re.I)
    phrases = []
    for part in re.split(rf"[,.;:!?]|\b(?:{BREAKS})\b", text, flags=re.I):
        phrase, after_verb = [], False
        for word in part.split():
            if word.lower() in DETERMINERS:
                unlisted_verb = not after_verb and len(phrase) > 2  # "cap release the", "a man riding a"
                phrases.append(phrase[:-1] if unlisted_verb else phrase)
                phrase, after_verb = [word], False
            elif word.lower() in VERBS:
                after_verb = True
            elif not after_verb:
                phrase.append(word)
        phrases.append(phrase)
    return [" ".join(phrase).replace("_", " ") for phrase in phrases
            if any(word.lower() not in DETERMINERS for word in phrase)]
