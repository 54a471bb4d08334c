/* TensorRT 8.6 as far as somebody gets who only runs 10 and later: its version, and no getInferLibMajorVersion. */
#include <stdio.h>
#include <stdlib.h>

int getInferLibVersion(void) { return 8601; }

void *createInferRuntime_INTERNAL(void *logger, int version)
{
    (void)logger;
    (void)version;
    fputs("fake nvinfer 8: a runtime was asked of a version that is not supported\n", stderr);
    abort();
}
