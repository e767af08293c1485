"""Encoders with a classifier. A family is added here: one entry."""

from ee_scale.families.family import FFN, HEADS, HIDDEN, KV, VOCAB, Elastic, Family

ENCODERS = (
    Family(
        "bert",
        {
            "bert.embeddings.word_embeddings": (VOCAB, HIDDEN),
            "bert.embeddings.position_embeddings": ("whole", HIDDEN),
            "bert.embeddings.token_type_embeddings": ("whole", HIDDEN),
            "bert.embeddings.LayerNorm": (HIDDEN,),
            "bert.encoder.layer.*.attention.self.query": (HEADS, HIDDEN),
            "bert.encoder.layer.*.attention.self.key": (KV, HIDDEN),
            "bert.encoder.layer.*.attention.self.value": (KV, HIDDEN),
            "bert.encoder.layer.*.attention.output.dense": (HIDDEN, HEADS),
            "bert.encoder.layer.*.attention.output.LayerNorm": (HIDDEN,),
            "bert.encoder.layer.*.intermediate.dense": (FFN, HIDDEN),
            "bert.encoder.layer.*.output.dense": (HIDDEN, FFN),
            "bert.encoder.layer.*.output.LayerNorm": (HIDDEN,),
            "bert.pooler.dense": (HIDDEN, HIDDEN),
            "classifier": ("labels", HIDDEN),
        },
        task="classify",
        layers="encoder.layer",
        heads=("bert.pooler.dense", "classifier"),
        attention=("attention.",),
        mlp=("intermediate.", "output."),
        elastic=Elastic(head_dim_is_derived=True),
    ),
)
