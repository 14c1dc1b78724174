/* A small libnvidia-ml.so.1 for tests. It reads the machine to simulate from the file named by FAKE_NVML, one fact a
   line: "init CODE", "hang PIDFILE", "gpu UUID TOTAL FREE MIG NAME" (-1: not supported; amounts in MiB),
   "slice GPU NAME", "user GPU PID NAME" ("?": unknown), "lost GPU". */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SUCCESS = 0, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7, GPU_IS_LOST = 15 };

static struct { char uuid[96], name[96]; long total, free; int mig, lost, slices, users; } gpus[8];
static char slices[8][8][96], names[8][8][96];
static unsigned pids[8][8], count;

#define GPU(device) ((int)((long)(device) % 100 - 1))
#define MIG(device) ((int)((long)(device) / 100 - 1))

static int read_machine(void) {
    char line[512];
    int code = 0, gpu;
    FILE *file = fopen(getenv("FAKE_NVML"), "r");
    while (file && fgets(line, sizeof line, file)) {
        char text[256] = "";
        unsigned pid;
        if (sscanf(line, "init %d", &code) == 1) continue;
        if (sscanf(line, "hang %255s", text) == 1) {
            FILE *out = fopen(text, "w");
            fprintf(out, "%d", getpid());
            fclose(out);
            sleep(60);
        }
        if (sscanf(line, "gpu %95s %ld %ld %d %95[^\n]", gpus[count].uuid, &gpus[count].total, &gpus[count].free,
                   &gpus[count].mig, gpus[count].name) == 5) count++;
        else if (sscanf(line, "slice %d %95[^\n]", &gpu, text) == 2) strcpy(slices[gpu][gpus[gpu].slices++], text);
        else if (sscanf(line, "lost %d", &gpu) == 1) gpus[gpu].lost = 1;
        else if (sscanf(line, "user %d %u %95[^\n]", &gpu, &pid, text) == 3) {
            pids[gpu][gpus[gpu].users] = pid;
            strcpy(names[gpu][gpus[gpu].users++], text);
        }
    }
    return code;
}

int nvmlInitWithFlags(unsigned flags) { return read_machine(); }
int nvmlShutdown(void) { return SUCCESS; }
const char *nvmlErrorString(int code) {
    return code == 18 ? "Driver/library version mismatch" : code == GPU_IS_LOST ? "GPU is lost" : "Driver Not Loaded";
}
int nvmlSystemGetDriverVersion(char *out, unsigned size) { snprintf(out, size, "580.159.03"); return SUCCESS; }
int nvmlDeviceGetCount_v2(unsigned *out) { *out = count; return SUCCESS; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **out) {
    *out = (void *)(long)(index + 1);
    return gpus[index].lost ? GPU_IS_LOST : SUCCESS;
}
int nvmlDeviceGetUUID(void *device, char *out, unsigned size) {
    snprintf(out, size, "%s", gpus[GPU(device)].uuid);
    return SUCCESS;
}
int nvmlDeviceGetName(void *device, char *out, unsigned size) {
    int gpu = GPU(device), mig = MIG(device);
    if (mig >= 0) snprintf(out, size, "%s MIG %s", gpus[gpu].name, slices[gpu][mig]);
    else snprintf(out, size, "%s", gpus[gpu].name);
    return SUCCESS;
}
int nvmlDeviceGetMemoryInfo(void *device, unsigned long long *out) {
    int gpu = GPU(device);
    out[0] = (unsigned long long)gpus[gpu].total << 20;
    out[1] = (unsigned long long)gpus[gpu].free << 20;
    return gpus[gpu].total < 0 ? NOT_SUPPORTED : SUCCESS;
}
int nvmlDeviceGetMigMode(void *device, unsigned *current, unsigned *pending) {
    *current = *pending = gpus[GPU(device)].mig == 1;
    return gpus[GPU(device)].mig < 0 ? NOT_SUPPORTED : SUCCESS;
}
int nvmlDeviceGetMaxMigDeviceCount(void *device, unsigned *out) { *out = 7; return SUCCESS; }
int nvmlDeviceGetMigDeviceHandleByIndex(void *device, unsigned index, void **out) {
    *out = (void *)((long)device + 100 * (long)(index + 1));
    return (int)index < gpus[GPU(device)].slices ? SUCCESS : NOT_FOUND;
}
struct process { unsigned pid; unsigned long long memory; unsigned gpu_instance, compute_instance; };
int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned *size, struct process *out) {
    int gpu = GPU(device), users = gpus[gpu].users;
    if ((int)*size < users) { *size = users; return INSUFFICIENT_SIZE; }
    *size = users;
    for (int i = 0; i < users; i++) out[i].pid = pids[gpu][i];
    return SUCCESS;
}
int nvmlSystemGetProcessName(unsigned pid, char *out, unsigned size) {
    for (int gpu = 0; gpu < 8; gpu++)
        for (int i = 0; i < gpus[gpu].users; i++)
            if (pids[gpu][i] == pid && strcmp(names[gpu][i], "?")) {
                snprintf(out, size, "%s", names[gpu][i]);
                return SUCCESS;
            }
    return NOT_FOUND;
}
