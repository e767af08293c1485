"""Encoders with a classifier. A family is added here: one entry."""

from ee_scale.families.family import FFN, HEADS, HIDDEN, KV, VOCAB, Elastic, Family

WHOLE, LABELS = "whole", "labels"


def _post_norm(base: str) -> dict[str, tuple[str, ...]]:
    """Embeddings and layers as BERT has them, in the base model of that name."""
    inside = {
        "embeddings.word_embeddings": (VOCAB, HIDDEN),
        "embeddings.position_embeddings": (WHOLE, HIDDEN),
        "embeddings.token_type_embeddings": (WHOLE, HIDDEN),
        "embeddings.LayerNorm": (HIDDEN,),
        "encoder.layer.*.attention.self.query": (HEADS, HIDDEN),
        "encoder.layer.*.attention.self.key": (KV, HIDDEN),
        "encoder.layer.*.attention.self.value": (KV, HIDDEN),
        "encoder.layer.*.attention.output.dense": (HIDDEN, HEADS),
        "encoder.layer.*.attention.output.LayerNorm": (HIDDEN,),
        "encoder.layer.*.intermediate.dense": (FFN, HIDDEN),
        "encoder.layer.*.output.dense": (HIDDEN, FFN),
        "encoder.layer.*.output.LayerNorm": (HIDDEN,),
    }
    return {f"{base}.{name}": axes for name, axes in inside.items()}


def _roberta(name: str) -> Family:
    return Family(
        name,
        _post_norm("roberta") | {"classifier.dense": (HIDDEN, HIDDEN), "classifier.out_proj": (LABELS, HIDDEN)},
        task="classify",
        layers="encoder.layer",
        final_norm=None,
        heads=("classifier.dense", "classifier.out_proj"),
        attention=("attention.",),
        mlp=("intermediate.", "output."),
        counts_from_padding=True,
        elastic=Elastic(head_dim_is_derived=True),
    )


ENCODERS = (
    Family(
        "bert",
        _post_norm("bert") | {"bert.pooler.dense": (HIDDEN, HIDDEN), "classifier": (LABELS, HIDDEN)},
        task="classify",
        layers="encoder.layer",
        final_norm=None,
        heads=("bert.pooler.dense", "classifier"),
        attention=("attention.",),
        mlp=("intermediate.", "output."),
        elastic=Elastic(head_dim_is_derived=True),
    ),
    _roberta("roberta"),
    _roberta("xlm-roberta"),
    Family(
        "modernbert",
        {
            "model.embeddings.tok_embeddings": (VOCAB, HIDDEN),
            "model.embeddings.norm": (HIDDEN,),
            "model.layers.*.attn_norm": (HIDDEN,),
            "model.layers.*.attn.Wqkv.query": (HEADS, HIDDEN),
            "model.layers.*.attn.Wqkv.key": (KV, HIDDEN),
            "model.layers.*.attn.Wqkv.value": (KV, HIDDEN),
            "model.layers.*.attn.Wo": (HIDDEN, HEADS),
            "model.layers.*.mlp_norm": (HIDDEN,),
            "model.layers.*.mlp.Wi.input": (FFN, HIDDEN),
            "model.layers.*.mlp.Wi.gate": (FFN, HIDDEN),
            "model.layers.*.mlp.Wo": (HIDDEN, FFN),
            "model.final_norm": (HIDDEN,),
            "head.dense": (HIDDEN, HIDDEN),
            "head.norm": (HIDDEN,),
            "classifier": (LABELS, HIDDEN),
        },
        task="classify",
        final_norm="final_norm",
        heads=("head.dense", "classifier"),
        head_norms=("head.norm",),
        attention=("attn.",),
        mlp=("mlp.",),
        fused={"Wqkv": ("query", "key", "value"), "Wi": ("input", "gate")},
        elastic=Elastic(head_dim_is_derived=True, first_layer_stays=True),
    ),
)
