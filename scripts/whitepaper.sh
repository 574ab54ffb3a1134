#!/bin/sh
# The whitepaper's tables and figures on the networks and images of LOWBIT_DATA, into results/.
#
#     LOWBIT_DATA=folder scripts/whitepaper.sh [--limit=100 and other flags of eval.whitepaper]
#
# What is in results/whitepaper.csv already is not measured again.  The columns of tables 4 to 6 that
# train take hours; a run that was killed goes on.
set -u
# In training twice: the others are of ten classes.
pictures=images/imagenet_calibration_1000.zip
status=0
for what in --table=1 --table=2 --table=3 --table=4 --table=5 --table=6 --figure=3 --figure=10 \
    --figure=11; do
    case "$what" in
    # At 4 bits 800 pictures bring PTQ nearer to float than 100 (docs/qat.md); 200 are left to choose by.
    --table=[56] | --figure=11) images=800 ;;
    *) images=100 ;;
    esac
    python -m eval.whitepaper "$what" --root="${LOWBIT_DATA:?names the folder of models and images}" \
        --networks=scripts/networks.toml --dataset=images/nips17_dev_500.zip \
        --calibration="$pictures" --recipe_images="$images" \
        --training="$pictures,$pictures,images/imagenette_train_5000.zip" \
        "$@" || status=1
done
for what in --figure=18 --figure=19; do
    python -m eval.whitepaper "$what" --root="$LOWBIT_DATA" --networks=scripts/networks.toml \
        --models=mobilenet_v1_0.25_224 || status=1
done
python -m eval.whitepaper --figure=20 --root="$LOWBIT_DATA" --networks=scripts/networks.toml \
    --models=mobilenet_v1_1.0_224 || status=1
exit "$status"
